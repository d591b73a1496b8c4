"""What every fit worker runs: student, DeepSpeed engine, steps, held-out looks, checkpoints."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed
import ray.train
import torch
from deepspeed.accelerator import get_accelerator
from ray.train import CheckpointConsistencyMode
from safetensors.torch import load as load_tensors
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from crosslora.adapter import read_adapter
from crosslora.config import Config, Fit
from crosslora.models import load_model, resolve
from crosslora.projection.build import projection_from
from crosslora.projection.projection import Projection
from crosslora.projection.student import Student, check_logits
from crosslora.run_folder import RunFolder
from crosslora.sizing import LONGEST_PLAIN_ATTENTION
from crosslora.teacher.corpus import read_corpus
from crosslora.text.pair import TokenizerPair
from crosslora.training import state
from crosslora.training.batches import (
    Batch,
    Example,
    batch_indices,
    build_examples,
    collate,
    held_out_batches,
    micro_batches,
)
from crosslora.training.checkpoint import Progress, Tensors, load, save
from crosslora.training.losses import losses_of, num_chunks, summed_loss
from crosslora.training.rehearsal import rehearsal
from crosslora.training.shares import keep_share

GRADIENT_NORM = 1.0
BUCKET = 1 << 24
"""Numbers that workers exchange at a time. DeepSpeed's own default takes gigabytes of every GPU for gradients that
are a fraction of that here."""


def train_worker(job: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker. `job`: config, adapter (its path), corpus (its two stages), start (its file),
    board."""
    context = ray.train.get_context()
    os.environ.setdefault(
        "LOCAL_SIZE", str(context.get_local_world_size())
    )  # DeepSpeed's CPU accelerator asks
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    join_group()
    config = Config.model_validate(job["config"])
    pair = TokenizerPair.load(config.source, config.target)
    folder = RunFolder.open(config.run)
    samples = read_corpus(folder, *job["corpus"])
    train, held_out = (build_examples(part, pair, config.fit.max_tokens) for part in samples)
    use_plain_attention(example.length for example in [*train, *held_out])
    adapter = read_adapter(job["adapter"])
    start = load_tensors(folder.read_bytes(job["start"]))
    residual = config.fit.residual
    projection = projection_from(start, adapter, config.source, config.target, residual=residual)
    engine = build_engine(build_student(config, projection), ds_config(config.fit))
    check_logits(engine.module.base)
    if config.fit.rehearsal:
        if context.get_world_rank() == 0:
            job["board"].add.remote({"event": "rehearsal"})
        train += rehearsal(engine.module.base, pair, train, config.fit.rehearsal, config.fit.random_seed)
    Loop(engine, config.fit, train, held_out, job["board"]).run()


def join_group(backend: str | None = None) -> None:
    """The group of all workers, which Ray has made; with a backend it is made from the environment's variables.

    On CPU DeepSpeed would compile an all-reduce of its own here: half a minute, a C++ compiler, and a path without
    spaces, for gradients that gloo moves in no time.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, dist_init_required=backend is not None)


def use_plain_attention(lengths: Iterable[int]) -> None:
    """Leave fused attention out on CPU where sequences are short: its backward pass takes several times as long there
    as that of the plain products."""
    if not torch.cuda.is_available() and max(lengths) <= LONGEST_PLAIN_ATTENTION:
        torch.backends.cuda.enable_flash_sdp(False)  # the switch of the CPU's fused kernel too


def ds_config(fit: Fit) -> dict[str, Any]:
    """DeepSpeed's settings. The base keeps the dtype it was loaded in and the projection stays float32, so
    DeepSpeed's own mixed precision, which would cast both, stays off."""
    workers = fit.workers
    return {
        "train_batch_size": fit.batch_size,
        "train_micro_batch_size_per_gpu": fit.batch_size // workers // fit.micro_batches,
        "gradient_accumulation_steps": fit.micro_batches,
        "gradient_clipping": GRADIENT_NORM,
        "zero_optimization": {
            "stage": fit.zero_stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def learning_rate(fit: Fit, step: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    warm = max(round(fit.warmup * fit.steps), 1)
    return fit.learning_rate * min((step + 1) / warm, (fit.steps - step) / max(fit.steps - warm, 1))


def build_student(config: Config, projection: Projection) -> Student:
    return Student(load_base(config), projection)


def load_base(config: Config) -> PreTrainedModel:
    """The target base; with ZeRO-3 only this worker's share of it stays."""
    if config.fit.zero_stage == 3:
        base = load_model(resolve(config.target), "auto")
        keep_share(base, config.fit.dtype, ds_config(config.fit))
    else:
        base = load_model(resolve(config.target), config.fit.dtype)
    if config.fit.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in base.modules():  # layers that train are computed again; dropout stays off
            module.training = isinstance(module, GradientCheckpointingLayer)
    return base


def build_engine(student: Student, settings: dict[str, Any]) -> Any:
    # the engine moves no student whose base is shared out already
    student.projection.to(get_accelerator().current_device_name())
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(
        model=student,
        optimizer=optimizer,
        model_parameters=parameters,
        config=settings,
        dist_init_required=False,
    )
    return engine


class Loop:
    """Steps from the last checkpoint to the stopping point."""

    def __init__(
        self, engine: Any, fit: Fit, train: Sequence[Example], held_out: Sequence[Example], board: Any
    ) -> None:
        self.engine, self.fit, self.train, self.held_out, self.board = engine, fit, train, held_out, board
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.vocabulary = engine.module.base.get_output_embeddings().out_features
        self.progress = Progress()
        self.best = self._parameters()

    def run(self) -> None:
        self._resume()
        if self.progress.step == 0:
            self._look()
        batches = islice(
            batch_indices(self.train, self.fit.batch_size, self.fit.random_seed),
            self.progress.step,
            None,
        )
        while self.progress.step < self.fit.steps and not self._has_stalled():
            started = time.monotonic()
            loss, tokens = self._step([self.train[i] for i in next(batches)])
            self.progress.step += 1
            self._tell(
                "step",
                step=self.progress.step,
                loss=loss,
                tokens=tokens,
                seconds=round(time.monotonic() - started, 4),
            )
            last = self.progress.step == self.fit.steps
            if last or self.progress.step % self.fit.evaluate_every == 0:
                self._look()
            if last or self.progress.step % self.fit.checkpoint_every == 0 or self._has_stalled():
                self._checkpoint()

    def _has_stalled(self) -> bool:
        return self.progress.looks_without_gain >= self.fit.patience

    def _step(self, examples: list[Example]) -> tuple[float, int]:
        """One optimizer step. Returns the mean loss over this rank's rows in nats, and the global batch's tokens."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.fit, self.progress.step)
        rows = sum(len(example.targets.student_ids) for example in examples)
        # DeepSpeed divides by the micro-batches and averages over ranks; this makes it the mean over all rows
        scale = self.world * self.fit.micro_batches / rows
        total = 0.0
        for part in micro_batches(examples[self.rank :: self.world], self.fit.micro_batches):
            loss = self._batch_loss(collate(part).to(self.engine.device))
            self.engine.backward(loss * scale)
            self.engine.step()
            total += float(loss.detach())
        own_rows = sum(len(example.targets.student_ids) for example in examples[self.rank :: self.world])
        return total / own_rows, sum(example.length for example in examples)

    def _batch_loss(self, batch: Batch) -> torch.Tensor:
        """Summed loss of a batch in nats."""
        chunks = self._chunks(batch)
        return summed_loss(
            self._hidden(batch), batch.rows, self.engine.module.logits, self.vocabulary, chunks
        )

    def _chunks(self, batch: Batch) -> int:
        """Calls of the head. Each gathers it with ZeRO-3: then all ranks must call it equally often."""
        chunks = num_chunks(len(batch.rows), self.vocabulary)
        if self.fit.zero_stage < 3:
            return chunks
        most = torch.tensor(chunks, device=self.engine.device)
        deepspeed.comm.all_reduce(most, op=deepspeed.comm.ReduceOp.MAX)
        return int(most)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states of the scored positions [N, hidden]."""
        hidden: torch.Tensor = self.engine(batch.ids).flatten(0, 1)[batch.positions]
        return hidden

    def _look(self) -> None:
        """Loss on the held-out samples; keeps the parameters where it is the best so far."""
        loss, kl = self._held_out_losses()
        if self.progress.step == 0:  # the output maps start at zero: this is the target base
            self.progress.start_kl = kl
        if loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_kl = loss, kl
            self.progress.best_step, self.progress.looks_without_gain = self.progress.step, 0
            self.best = self._parameters()
        else:
            self.progress.looks_without_gain += 1
        self._tell("held_out", step=self.progress.step, loss=loss, kl=kl, best_step=self.progress.best_step)

    @torch.no_grad()
    def _held_out_losses(self) -> tuple[float, float]:
        """Mean loss over the held-out samples' rows, and mean KL over those of them that are strict."""
        # of the losses and their number: all rows, strict ones
        sums = torch.zeros(2, 2, dtype=torch.float64, device=self.engine.device)
        for examples, counts in held_out_batches(self.held_out, self.rank, self.world):
            batch = collate(examples).to(self.engine.device)
            chunks = self._chunks(batch)
            losses_N = losses_of(
                self._hidden(batch), batch.rows, self.engine.module.logits, self.vocabulary, chunks
            )
            for row, own in enumerate((losses_N, losses_N[batch.rows.strict])):
                sums[row] += counts * sums.new_tensor([float(own.sum()), len(own)])
        deepspeed.comm.all_reduce(sums)
        # the same on all ranks, to the last bit: what is done with them must not differ
        deepspeed.comm.broadcast(sums, src=0)
        loss, kl = (sums[:, 0] / sums[:, 1]).tolist()
        return loss, kl

    def _checkpoint(self) -> None:
        """Every rank gathers and reports; rank 0 writes."""
        parameters, moments = self._parameters(), state.gather_moments(self.engine, keep=self.rank == 0)
        self.progress.adam_step = state.adam_step(self.engine)
        with self._folder() as name:
            checkpoint = None
            if name is not None:
                save(Path(name), parameters, moments, self.best, self.progress)
                checkpoint = ray.train.Checkpoint.from_directory(name)
            ray.train.report(
                {"step": self.progress.step, "held_out": self.progress.best_loss}, checkpoint=checkpoint
            )
            # Ray Train learns of a checkpoint when it next asks its workers; a run that is killed before then
            # would go on from the one before.
            ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)

    def _parameters(self) -> Tensors:
        """On rank 0, which writes; nowhere else."""
        return state.gather_parameters(self.engine, keep=self.rank == 0)

    def _folder(self) -> AbstractContextManager[str | None]:
        return tempfile.TemporaryDirectory() if self.rank == 0 else nullcontext(None)

    def _resume(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            parameters, moments, best, self.progress = load(Path(folder))
        self.best = best if self.rank == 0 else {}
        state.restore(self.engine, parameters, moments, self.progress.adam_step)
        self._tell("resumed", step=self.progress.step)

    def _tell(self, event: str, **fields: Any) -> None:
        if self.rank == 0:
            self.board.add.remote({"event": event, **fields})
