"""Fit: Ray Train starts the workers, shows their progress, and keeps the best projection."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from crosslora import cluster
from crosslora.adapter import read_adapter
from crosslora.config import Config
from crosslora.errors import UserError
from crosslora.precision import decided
from crosslora.progress import progress, say
from crosslora.projection.build import build_transfer
from crosslora.run_folder import Stage
from crosslora.teacher.corpus import read_corpus
from crosslora.text.alignment import coverage
from crosslora.text.pair import TokenizerPair
from crosslora.training.batches import build_examples
from crosslora.training.checkpoint import LEARNED, START, load
from crosslora.training.rate import relative_rate
from crosslora.training.record import mend_record

TRAIN = "train"
"""Folder of what Ray Train keeps, in that of the fit."""
SECONDS_BETWEEN_POLLS = 1.0
SECONDS_BETWEEN_CHECKS = "0.2"
"""How often Ray Train asks its workers for news; every checkpoint waits for it."""


def fit(config: Config, adapter: Path, corpus: tuple[str, str], stage: Stage) -> dict[str, Any]:
    """Train to the stopping point, resuming from the last checkpoint; returns the manifest."""
    config = decided(config)
    reach = check_corpus(config, stage, corpus)
    settings = relative_rate(config.fit, config.target)
    say(f"  learning rate {settings.learning_rate:.1e}, for weights as large as the target's")
    with cluster.board() as board:
        job = {
            "config": config.model_copy(update={"fit": settings}).model_dump(mode="json"),
            "adapter": str(adapter),
            "corpus": corpus,
            "start": f"{stage.name}/{START}",
            "board": board,
        }
        start = None if _is_readable(stage, job["start"]) else _start(config, adapter)
        mend_record(stage.folder.sub(f"{stage.name}/{TRAIN}/{_experiment(stage)}"))
        trainer = _trainer(config, stage, job)
        if start is not None:  # written when nothing is refused any more
            stage.folder.write_bytes(job["start"], start)
        with _Watcher(board, stage, config.fit.steps) as watcher, _own_interrupts():
            try:
                result = trainer.fit()
            except TrainingFailedError as error:
                cause = " ".join(str(error).split())[-400:]
                raise UserError(
                    f"fit: the workers failed {config.fit.max_failures + 1} times ({cause}); mend the cause and run the "
                    "same command, without --redo: it goes on from the last checkpoint"
                ) from error
    return _finish(result, stage, watcher, reach, config.fit.dtype)


def _start(config: Config, adapter: Path) -> bytes:
    """What the projection starts from, as a safetensors file; of large bases it takes minutes."""
    say("  working out what the projection starts from")
    pair = TokenizerPair.load(config.source, config.target)
    seed = config.fit.random_seed
    transfer = build_transfer(read_adapter(adapter), config.source, config.target, pair, seed)
    return save_tensors(transfer.start())


def _is_readable(stage: Stage, name: str) -> bool:
    """Then it stays: what checkpoints hold was learned from it. One that a crash cut short was read by no worker."""
    try:
        return bool(load_tensors(stage.folder.read_bytes(name)))
    except (FileNotFoundError, SafetensorError):
        return False


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Ray Train takes Ctrl-C for itself, ends the process, and keeps it after the fit, where it would do nothing; take it
    back."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:  # Ray's own answer to that signal
            raise
        raise KeyboardInterrupt from None
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _trainer(config: Config, stage: Stage, job: dict[str, Any]) -> TorchTrainer:
    """Raises UserError where the cluster cannot hold the workers."""
    workers, gpus = config.fit.workers, config.cluster.gpus_per_worker
    bundle = cluster.bundle(gpus, workers)
    cluster.require(bundle, workers, "fit", config.cluster.wait_seconds)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", SECONDS_BETWEEN_CHECKS)
    return TorchTrainer(
        _train,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=scaling(workers, bundle),
        run_config=_run_config(config, stage, int(bundle["CPU"]), "cuda" if gpus else "cpu"),
    )


def scaling(workers: int, bundle: cluster.Bundle) -> ScalingConfig:
    """GPUs of one node exchange gradients and shards faster; CPUs of one node share its memory bandwidth."""
    on_gpu = "GPU" in bundle
    return ScalingConfig(
        num_workers=workers,
        use_gpu=on_gpu,
        resources_per_worker=bundle,
        placement_strategy="PACK" if on_gpu else "SPREAD",
    )


def _train(job: dict[str, Any]) -> None:
    """What a worker runs. DeepSpeed is imported there alone: the command starts seconds sooner without it."""
    from crosslora.training.loop import train_worker

    train_worker(job)


def check_corpus(config: Config, stage: Stage, corpus: tuple[str, str]) -> float:
    """Coverage of the corpus; raises UserError before any worker starts where there is too little to learn from."""
    pair = TokenizerPair.load(config.source, config.target)
    samples = read_corpus(stage.folder, *corpus)
    train, held_out = (build_examples(part, pair, config.fit.max_tokens) for part in samples)
    left_out = sum(map(len, samples)) - len(train) - len(held_out)
    if len(train) < config.fit.batch_size or not held_out:
        raise UserError(
            f"fit: {len(train)} samples to train on and {len(held_out)} held out are left; {left_out} are longer than "
            f"fit.max_tokens = {config.fit.max_tokens} or cannot be written with the target's tokens: raise it, or "
            "synthesis.samples (--redo filter), or lower fit.batch_size"
        )
    reach = coverage(example.targets for example in train)
    if reach < config.fit.min_coverage:
        raise UserError(
            f"fit: coverage {reach:.2f} is below fit.min_coverage = {config.fit.min_coverage}: too few of the "
            "student's tokens line up with the teacher's; lower it to train on the teacher's text alone"
        )
    stage.event(
        "corpus", train=len(train), held_out=len(held_out), left_out=left_out, coverage=round(reach, 4)
    )
    without = f", {left_out} too long or not to be written with the target's tokens" if left_out else ""
    say(f"  {len(train)} samples to train on, {len(held_out)} held out{without}, coverage {reach:.3f}")
    return reach


def _experiment(stage: Stage) -> str:
    """Ray Train resumes whatever has the same name and place: of other inputs it is another."""
    return stage.digest[:16]


def _run_config(config: Config, stage: Stage, cpus: int, accelerator: str) -> RunConfig:
    return RunConfig(
        name=_experiment(stage),
        storage_path=stage.folder.path(f"{stage.name}/{TRAIN}"),
        storage_filesystem=stage.folder.filesystem,
        failure_config=FailureConfig(max_failures=config.fit.max_failures),
        checkpoint_config=CheckpointConfig(num_to_keep=2),
        worker_runtime_env={
            "env_vars": {
                "OMP_NUM_THREADS": str(cpus),
                "DS_ACCELERATOR": accelerator,
                **cluster.fit_environment(config.fit.zero_stage, config.fit.gradient_checkpointing),
            }
        },
    )


def _finish(result: Any, stage: Stage, watcher: _Watcher, reach: float, dtype: str) -> dict[str, Any]:
    with result.checkpoint.as_directory() as folder:
        *_, reached = load(Path(folder))
        stage.folder.write_bytes(f"{stage.name}/{LEARNED}", (Path(folder) / "best.safetensors").read_bytes())
    return stage.finish(
        {
            "dtype": dtype,
            "steps": reached.step,
            "best_step": reached.best_step,
            "held_out_loss": reached.best_loss,
            "held_out_kl": {"target_base": reached.start_kl, "student": reached.best_kl},
            "coverage": round(reach, 4),
            "tokens_per_second": watcher.rate(),
        }
    )


class _Watcher:
    """Moves events from the board to events.jsonl and the progress bar while the trainer runs."""

    def __init__(self, board: Any, stage: Stage, steps: int) -> None:
        self._board, self._stage, self._steps = board, stage, steps
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._held_out = ""
        self._tokens = self._seconds = 0.0

    def __enter__(self) -> _Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def rate(self) -> float | None:
        """Tokens per second of the steps of this start, without what is between them."""
        return round(self._tokens / self._seconds, 1) if self._seconds else None

    def _watch(self) -> None:
        with progress("fit", self._steps, "steps") as meter:
            while True:
                stopping = self._stop.wait(SECONDS_BETWEEN_POLLS)
                for event in ray.get(self._board.take.remote()):
                    self._show(event, meter)
                if stopping:
                    return

    def _show(self, event: dict[str, Any], meter: Any) -> None:
        self._stage.event(**event)
        if event["event"] == "resumed":
            meter.start_at(event["step"])
        elif event["event"] == "rehearsal":
            meter.advance(0, "the target base writes text of its own")
        elif event["event"] == "held_out":
            self._held_out = f"held-out {event['loss']:.4f}"
        else:
            self._tokens += event["tokens"]
            self._seconds += event["seconds"]
            meter.advance(event["step"] - meter.done, f"loss {event['loss']:.3f} {self._held_out}")
