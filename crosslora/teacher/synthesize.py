"""Synthesis: teacher engines as Ray actors write the corpus, shard by shard."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from crosslora import cluster
from crosslora.adapter import read_adapter, write_adapter
from crosslora.cluster import SECONDS_BETWEEN_LOOKS
from crosslora.config import Base, Config, Synthesis
from crosslora.errors import UserError
from crosslora.precision import decided
from crosslora.progress import Meter, progress, say
from crosslora.run_folder import Stage
from crosslora.teacher.corpus import Sample, read_shard, shard_exists, write_shard
from crosslora.teacher.engine import Engine, Generation, Sampling, TransformersEngine, VllmEngine
from crosslora.teacher.prompts import (
    GENERAL,
    SELF,
    SelfPrompts,
    build_strategies,
    counts,
    read_prompts,
)
from crosslora.teacher.seeds import EXAMPLES, SHOTS, listed, mark_between
from crosslora.text.templates import ChatFormat

MOST_ENGINE_LOSSES = 3
"""In a row, without a shard between them."""
LOST = (RayActorError, RayTaskError, ObjectLostError, OutOfMemoryError)
"""What comes of an engine that was lost; the last where Ray stopped it before its node ran out of memory."""
SPARE = 8
"""Tokens that an engine has beyond the longest text; to score a text it takes one."""


class Teacher:
    """One engine and its prompt strategies; run as a Ray actor, a shard per call."""

    def __init__(self, base: Base, adapter: Path, settings: Synthesis, seed: int, board: Any) -> None:
        from crosslora.models import load_format, resolve
        from crosslora.text.vocabulary import Vocabulary

        self._settings, self._board = settings, board
        folder = resolve(base)
        self._chat = load_format(folder, base)
        self._words = Vocabulary(self._chat.tokenizer)
        with tempfile.TemporaryDirectory() as plain:  # in the form that every vLLM reads
            write_adapter(plain, read_adapter(adapter).factors, base.base)
            self._engine = _engine(folder, Path(plain), settings, seed, max_len(self._chat, settings))
            # vLLM reads the adapter at the first request; an engine that is killed later would leave the folder behind
            once = Sampling(0.0, 1, self._chat.stop_ids, top_k=0)
            self._engine.generate([self._chat.prompt_ids("a")], once, adapter=True)
        self._strategies = build_strategies(self._engine, self._words, self._chat, settings)

    def ready(self, are_answers: bool | None) -> bool | None:
        """Whether what the teacher writes in the user's place are answers; None where no strategy asks. `are_answers`:
        as it is known already, since engines might find different things."""
        found = None
        for _, strategy in self._strategies:
            if isinstance(strategy, SelfPrompts):
                found = strategy.decide(are_answers)
        return found

    def shard(self, index: int, size: int, are_answers: bool | None) -> list[Sample]:
        """Prompts, the teacher's answers, and the source base's opinion of these; `are_answers` as in `ready`."""
        self.ready(are_answers)
        self._tell(index, "writing prompts")
        shares = counts(size, [share for share, _ in self._strategies])
        drawn = []
        for count, (_, strategy) in zip(shares, self._strategies, strict=True):
            prompts = strategy.prompts(count, index)
            drawn += [(strategy.name, prompt) for prompt in prompts]
        prompt_ids = [self._chat.prompt_ids(prompt) for _, prompt in drawn]
        answers = self._engine.generate(
            prompt_ids, self._answering(), adapter=True, on_finished=self._reporter(index)
        )
        self._tell(index, "scoring by the source base alone")
        off = self._engine.score(prompt_ids, [answer.ids for answer in answers])
        return [
            self._sample(f"{index:05d}-{row:05d}", *drawn[row], answer, off[row])
            for row, answer in enumerate(answers)
        ]

    def _tell(self, index: int, doing: str) -> None:
        self._board.add.remote({"shard": index, "doing": doing})

    def _reporter(self, index: int) -> Callable[[int], None]:
        """Counts answers and tells the board about once a second."""
        count, told = 0, time.monotonic()

        def finished(number: int) -> None:
            nonlocal count, told
            count += number
            if time.monotonic() - told >= SECONDS_BETWEEN_LOOKS:
                self._board.add.remote({"shard": index, "answers": count})
                count, told = 0, time.monotonic()

        return finished

    def _answering(self) -> Sampling:
        s = self._settings
        return Sampling(s.response_temperature, s.max_response_tokens, self._chat.stop_ids, s.top_k)

    def _sample(self, sample_id: str, strategy: str, prompt: str, answer: Generation, off: Any) -> Sample:
        text_ids = answer.ids[:-1] if answer.finished else answer.ids
        return Sample(
            sample_id=sample_id,
            strategy=strategy,
            prompt=prompt,
            response=self._words.text(text_ids.tolist()),
            finished=answer.finished,
            response_ids=answer.ids,
            top_ids=answer.top_ids,
            top_logprobs=answer.top_logprobs,
            logprobs_on=answer.logprobs,
            logprobs_off=off,
        )


def _engine(folder: str, adapter: Path, settings: Synthesis, seed: int, max_len: int) -> Engine:
    from crosslora.vllm_settings import parallel_options

    if settings.engine == "transformers":
        return TransformersEngine(folder, adapter, dtype=settings.dtype, seed=seed)
    return VllmEngine(
        folder,
        adapter,
        dtype=settings.dtype,
        max_len=max_len,
        top_k=settings.top_k,
        parallel=parallel_options(settings.tensor_parallel, settings.pipeline_parallel),
        seed=seed,
    )


def max_len(chat: ChatFormat, settings: Synthesis) -> int:
    """Tokens of the longest prompt that an engine may be given, and of an answer to it."""
    around = len(chat.prompt_ids("a"))
    # what the teacher wrote may take more tokens when it is read again
    longest = 2 * settings.max_prompt_tokens + around
    seeds_file = settings.prompts.seeds_file
    if settings.prompts.self > 0 or seeds_file:
        seeds = read_prompts(seeds_file, "seeds_file") if seeds_file else []
        shown = sorted([*seeds, *EXAMPLES], key=lambda text: len(chat.prompt_ids(text)), reverse=True)[:SHOTS]
        text = listed(shown, mark_between(seeds))
        longest = max(longest, len(chat.tokenizer(text)["input_ids"]) + settings.max_prompt_tokens)
    if settings.prompts.prompts_file:
        given = read_prompts(settings.prompts.prompts_file, "prompts_file")
        longest = max(longest, *(len(chat.prompt_ids(prompt)) for prompt in given))
    return longest + settings.max_response_tokens + SPARE


def check_room(config: Config, chat: ChatFormat) -> None:
    """Raise UserError where the longest prompt with its answer does not fit into the context of the source base."""
    from crosslora.models import context_length, resolve

    needed = max_len(chat, config.synthesis)
    context = context_length(resolve(config.source, weights=False), needed)
    if needed > context:
        raise UserError(
            f"synthesis: a prompt with its answer takes up to {needed} tokens, {config.source.name} has room for {context}; "
            "lower max_prompt_tokens or max_response_tokens, or leave out the longest seed examples or prompts"
        )


def synthesize(config: Config, adapter: Path, stage: Stage) -> dict[str, Any]:
    """Generate the shards that are missing; returns the manifest."""
    config = decided(config)
    settings = config.synthesis
    done = _written(stage, settings)
    missing = _missing(done, settings)
    started, rate = time.monotonic(), None
    if missing:
        engines = min(settings.engines, len(missing))
        say(f"  starting {engines} teacher engine{'s' * (engines > 1)} ({settings.engine}, {settings.dtype})")
        with cluster.board() as board:
            foreman = _Foreman(config, adapter, stage, done, engines, board)
            try:
                with progress("synthesize", settings.samples, "samples") as meter:
                    meter.start_at(sum(_size(index, settings) for index in done))
                    foreman.run(meter)
                    rate = foreman.rate()
            finally:
                foreman.stop()
    return stage.finish(
        {
            "shards": _written(stage, settings),
            "samples": settings.samples,
            "minutes": settings.minutes,
            "dtype": settings.dtype,
            "seconds": round(time.monotonic() - started, 1),
            "response_tokens_per_second": rate,
        }
    )


class _Foreman:
    """Hands shards to the engines that are ready, writes what they bring, and replaces an engine that dies.

    A shard that was lost goes to whichever engine is free next: a new one may have to wait for a node.
    """

    def __init__(
        self,
        config: Config,
        adapter: Path,
        stage: Stage,
        done: list[int],
        num_engines: int,
        board: Any,
    ) -> None:
        """done: the shards that there are."""
        self.settings, self.stage, self.board = config.synthesis, stage, board
        self.pending = _missing(done, self.settings)
        seed = self.settings.random_seed * 1_000_003 + len(done)  # a resumed run must not repeat what it has
        self.bundles = cluster.engine_bundles(
            config.gpus_per_engine_and_node, self.settings.pipeline_parallel, num_engines
        )
        self.wait_seconds = config.cluster.wait_seconds
        self._new_engine = lambda group, number: _actor_class(group).remote(
            config.source, adapter, self.settings, (seed + 7919 * number) % 2**32, self.board
        )
        self.groups: dict[Any, PlacementGroup] = {}
        """Of every engine that was started."""
        self.starting: dict[Any, Any] = {}
        """Reference -> the engine that it says is ready."""
        self.work: dict[Any, tuple[Any, int]] = {}
        """Reference -> the engine and the shard that it brings."""
        self.idle: deque[Any] = deque()
        self.answered: Counter[int] = Counter()
        """Answers of each unfinished shard that the meter counts already."""
        self.losses = self.tokens = 0
        """Engines lost since the last shard; response tokens of all shards."""
        self.are_answers = _are_answers(stage, done, self.settings)
        """Whether what the teacher writes in the user's place are answers; None where that is not known."""
        self.told = False
        """Whether that was said."""
        self.started: float | None = None
        """When the first engine was ready."""
        self.placed = time.monotonic()
        """When an engine was last seen that had a place."""
        cluster.require(
            self.bundles[0], len(self.bundles), "synthesize", self.wait_seconds
        )  # others may come later
        for _ in range(num_engines):
            self._start()

    def run(self, meter: Meter) -> None:
        while self.work or (self._has_time() and self.pending):
            finished, _ = ray.wait([*self.starting, *self.work], timeout=SECONDS_BETWEEN_LOOKS)
            self._count_answers(meter)
            self._check_place()
            for reference in finished:
                if reference in self.starting:
                    self._welcome(reference)
                else:
                    self._take(reference, meter)
            while self.idle and self.pending and self._has_time():
                actor, index = self.idle.popleft(), self.pending.popleft()
                shard = actor.shard.remote(index, _size(index, self.settings), self.are_answers)
                self.work[shard] = (actor, index)

    def rate(self) -> float:
        """Response tokens per second of all engines, since the first was ready."""
        assert self.started is not None
        return round(self.tokens / (time.monotonic() - self.started), 1)

    def stop(self) -> None:
        for actor in [*self.groups]:
            self._end(actor)

    def _start(self) -> None:
        group = placement_group(self.bundles, strategy="PACK")
        actor = self._new_engine(group, len(self.groups))
        self.groups[actor] = group
        self.starting[actor.ready.remote(self.are_answers)] = actor

    def _end(self, actor: Any) -> None:
        ray.kill(actor)
        remove_placement_group(self.groups[actor])

    def _check_place(self) -> None:
        """Raise UserError where no engine is left and the next one has waited for a node too long."""
        if self.work or self.idle or any(cluster.is_placed(self.groups[a]) for a in self.starting.values()):
            self.placed = time.monotonic()
        elif time.monotonic() - self.placed > self.wait_seconds:
            cluster.require(self.bundles[0], len(self.bundles), "synthesize", wait_seconds=0)

    def _has_time(self) -> bool:
        minutes = self.settings.minutes
        return minutes is None or self.started is None or time.monotonic() < self.started + 60 * minutes

    def _welcome(self, reference: Any) -> None:
        actor = self.starting.pop(reference)
        try:
            are_answers = ray.get(reference)
        except LOST as error:
            _refuse(error)
            if self.started is None:
                raise UserError(
                    f"synthesize: the teacher's engine did not start ({_cause(error)}); mend that, or use "
                    "synthesis.engine: transformers, up to --until export, where vLLM cannot run the source base"
                ) from error
            self._replace(actor, "while it started", error)
        else:
            self.started = self.started or time.monotonic()
            self._decide(are_answers)
            self.idle.append(actor)

    def _decide(self, are_answers: bool | None) -> None:
        """The first engine that is ready decides for all, shards that there are for those that follow."""
        self.are_answers = are_answers if self.are_answers is None else self.are_answers
        if self.are_answers and not self.told:
            self.told = True
            say(
                "  the teacher writes answers in the user's place; the source base writes prompts of no domain"
            )

    def _count_answers(self, meter: Meter) -> None:
        unfinished = {index for _, index in self.work.values()}
        for event in ray.get(self.board.take.remote()):
            if event["shard"] not in unfinished:
                continue
            if "doing" in event:
                meter.advance(0, event["doing"])
            else:
                self.answered[event["shard"]] += event["answers"]
                meter.advance(event["answers"])

    def _take(self, reference: Any, meter: Meter) -> None:
        actor, index = self.work.pop(reference)
        answered = self.answered.pop(index, 0)
        try:
            samples = ray.get(reference)
        # the actor, the node that held what it brought, or vLLM in it: a GPU's memory, one of several workers
        except LOST as error:
            _refuse(error)
            meter.advance(-answered)
            self.pending.appendleft(index)
            self._replace(actor, f"on shard {index}", error)
            return
        write_shard(self.stage.folder, self.stage.name, index, samples, _size(index, self.settings))
        self.losses = 0
        self.tokens += sum(len(sample.response_ids) for sample in samples)
        rate = self.rate()
        self.stage.event("shard", shard=index, samples=len(samples), response_tokens_per_second=rate)
        meter.advance(_size(index, self.settings) - answered, f"{rate:.0f} response tokens/s")
        self.idle.append(actor)

    def _replace(self, lost: Any, when: str, error: Exception) -> None:
        """Start a new engine in place of one that died."""
        self._end(lost)  # it may only be out of reach, and its resources are what the new one needs
        self.losses += 1
        self.stage.event("engine_lost", when=when, losses=self.losses)
        if self.losses > MOST_ENGINE_LOSSES:
            raise UserError(
                f"synthesize: teacher engines died {self.losses} times in a row, last {when} "
                f"({_cause(error)}); look for too little memory, lower synthesis.shard_size"
            ) from error
        self._start()


def _refuse(error: Exception) -> None:
    """Raise what an engine says that the user can mend; as Ray hands it over, it shows the engine's traceback."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
        raise error.cause from None


def _cause(error: Exception) -> str:
    """Its line that says what happened: the last of a traceback, the first of Ray's advice on memory."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0 if isinstance(error, OutOfMemoryError) else -1].strip()[:300]


def _num_shards(settings: Synthesis) -> int:
    return -(-settings.samples // settings.shard_size)


def _written(stage: Stage, settings: Synthesis) -> list[int]:
    shards = range(_num_shards(settings))
    return [i for i in shards if shard_exists(stage.folder, stage.name, i, _size(i, settings))]


def _missing(done: list[int], settings: Synthesis) -> deque[int]:
    return deque(index for index in range(_num_shards(settings)) if index not in done)


def _are_answers(stage: Stage, done: list[int], settings: Synthesis) -> bool | None:
    """As it was decided for the shards that there are."""
    for index in done if settings.prompts.self > 0 else ():
        strategies = {sample.strategy for sample in read_shard(stage.folder, stage.name, index)}
        if strategies & {GENERAL, SELF}:
            return GENERAL in strategies
    return None


def _size(index: int, settings: Synthesis) -> int:
    return min(settings.shard_size, settings.samples - index * settings.shard_size)


def _actor_class(group: PlacementGroup) -> Any:
    """A Teacher in the first bundle; where there are more, each has a GPU for a worker that vLLM starts."""
    from crosslora.vllm_settings import environment

    cpus, gpus = group.bundle_specs[0]["CPU"], group.bundle_specs[0].get("GPU", 0)
    return ray.remote(Teacher).options(
        num_cpus=cpus,
        num_gpus=gpus if group.bundle_count == 1 else 0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        runtime_env={"env_vars": environment(int(cpus), gpus)},
    )
