"""How a command ends that was stopped."""

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
