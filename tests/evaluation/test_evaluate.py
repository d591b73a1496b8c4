"""What the models are asked."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from crosslora.config import HELD_OUT, Base, Task
from crosslora.errors import UserError
from crosslora.evaluation import evaluate
from crosslora.evaluation.evaluate import ROOM, _with_teacher_references
from crosslora.evaluation.results import PLAIN_TEXT, TEACHER
from crosslora.evaluation.tasks import Answer, Item
from crosslora.models import load_format
from crosslora.run_folder import RunFolder
from tests.tiny import bare_config, tiny_llama


def test_an_answer_to_a_held_out_prompt_fits_the_context_of_the_target(tmp_path: Path) -> None:
    """Twice the teacher's answer, or what is left beside the prompt of 512 positions."""
    base = Base(base=str(tiny_llama(tmp_path)))
    chat, config = load_format(base.base, base), bare_config(target={"base": base.base})
    task = Task(name=HELD_OUT, path=Path("corpus"), metrics=["exact_match"], max_tokens=256)

    def room(text: str) -> int | None:
        said = {"answers": {HELD_OUT: [asdict(Answer(text, ended=True))]}}
        tasks, _ = _with_teacher_references(config, chat, [(task, [Item("hi", "")])], {TEACHER: said})
        ((referenced, items),) = tasks
        assert items == [Item("hi", text)]
        return referenced.max_tokens

    assert room("字" * 20) == 2 * 61
    assert room("字" * 100) == 512 - ROOM - len(chat.prompt_ids("hi"))


def test_answers_that_the_teacher_did_not_end_or_that_do_not_fit_are_no_references(tmp_path: Path) -> None:
    base = Base(base=str(tiny_llama(tmp_path)))  # of 512 positions
    chat, config = load_format(base.base, base), bare_config(target={"base": base.base})
    task = Task(name=HELD_OUT, path=Path("corpus"), metrics=["exact_match"], max_tokens=256)
    other = (Task(name="mine", path=Path("mine")), [Item("a", "b")])
    prompts = ["hi", "go", "so", "x" * 600]
    answers = [Answer("yes", True), Answer("on and on", False), Answer("字" * 200, True), Answer("no", True)]

    def referenced(asked: list[Answer]) -> tuple[Any, list[Any]]:
        items = [Item(prompt, "") for prompt in prompts[: len(asked)]]
        said = {TEACHER: {"answers": {HELD_OUT: [asdict(answer) for answer in asked]}, "nats": {}}}
        tasks, left = _with_teacher_references(config, chat, [other, (task, items)], said)
        return tasks, left[TEACHER]["answers"][HELD_OUT]

    (first, (_, items)), left = referenced(answers)
    assert first == other and items == [Item("hi", "yes")] and left == [asdict(answers[0])]
    tasks, left = referenced([Answer("on and on", False)])
    assert tasks == [other] and left == []
    with pytest.raises(UserError, match=r"give evaluation\.tasks"):
        said = {TEACHER: {"answers": {HELD_OUT: [asdict(answers[1])]}}}
        _with_teacher_references(config, chat, [(task, [Item("go", "")])], said)


def test_a_model_that_has_said_all_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "serve_models", lambda *_, **__: pytest.fail("served again"))
    stage, config = RunFolder.open(str(tmp_path)).stage("evaluate/a", {}), bare_config()
    said = {"answers": {"check": [asdict(Answer("yes", ended=True))]}, "nats": {PLAIN_TEXT: [0.1, 1 / 3]}}
    stage.folder.write_json("evaluate/a/answers/teacher.json", said)
    chat: Any = None
    asked = evaluate._ask(config, config.source, "source", {}, chat, [], [TEACHER], stage)
    assert evaluate._answers(asked) == {TEACHER: {"check": [Answer("yes", ended=True)]}}
    assert evaluate._nats(asked)[TEACHER][PLAIN_TEXT].tolist() == [0.1, 1 / 3]
