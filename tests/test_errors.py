"""How a command ends that was stopped."""

import errno

import pytest

from crosslora.errors import INTERRUPTED, said_in_a_sentence


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), SystemExit(INTERRUPTED)])
def test_ctrl_c_is_said(stopped: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, said_in_a_sentence():
        raise stopped
    assert ended.value.code == 1 and capsys.readouterr().err.startswith("interrupted")


def test_other_ends_pass() -> None:
    with pytest.raises(SystemExit) as ended, said_in_a_sentence():
        raise SystemExit(0)
    assert ended.value.code == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_said(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, said_in_a_sentence():
        raise OSError(number, "full", "runs/mine/shard")
    assert (
        ended.value.code == 2
        and "disk full, or your quota of it, at runs/mine/shard" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/mine"),
            "runs/mine: Permission denied; give a place",
        ),
        (OSError("the bucket is gone\nmore"), "run folder or network: the bucket is gone; check names"),
    ],
)
def test_what_cannot_be_reached_is_said(
    error: OSError, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, said_in_a_sentence():
        raise error
    assert ended.value.code == 2 and said in capsys.readouterr().err
