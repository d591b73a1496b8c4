"""GOLD of TRL, what a user would take for distillation between tokenizers: off-policy, on the corpus of the other methods.

Its alignment by bytes refuses tokenizers such as Gemma's. What is left then compares positions one by one, beside the
cross-entropy on the teacher's text. Given to it are what its defaults would lose here: the teacher's own chat format in
place of the student's, and the ends of the answers.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.distil import teacher_kl
from benchmarks.train_adapter import DTYPE, WARM_UP, save
from crosslora.adapter import read_adapter
from crosslora.adapter_config import read_settings
from crosslora.config import Config
from crosslora.models import load_format, load_model, resolve
from crosslora.run_folder import RunFolder
from crosslora.teacher.corpus import Sample, read_corpus
from crosslora.training.loop import GRADIENT_NORM

RATE = 1e-3
"""The best of three for the oracle, in three of four cells."""


def gold(config: Config, corpus: tuple[str, str], folder: Path) -> dict[str, Any]:
    """Train with TRL and save the adapter; returns minutes and KL(teacher || student) on the held-out samples, nats per
    strict position."""
    train, held_out = read_corpus(RunFolder.open(config.run), *corpus)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    started = time.monotonic()
    trainer = gold_trainer(config, train, folder, RATE)
    trainer.train()
    minutes = (time.monotonic() - started) / 60
    save(trainer.model, config.target.base, folder)
    return {"minutes": minutes, "held_out_kl": teacher_kl(config, read_adapter(folder).factors, held_out)}


def gold_trainer(config: Config, samples: list[Sample], folder: Path, learning_rate: float) -> Any:
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    fit, (adapter,) = config.fit, config.adapters
    source, target = resolve(config.source), resolve(config.target)
    teachers, students = load_format(source, config.source), load_format(target, config.target)
    students.tokenizer.eos_token = students.tokenizer.convert_ids_to_tokens(students.eos_id)
    settings = GOLDConfig(
        output_dir=str(folder / "trainer"),
        max_steps=fit.steps,
        per_device_train_batch_size=fit.batch_size,
        learning_rate=learning_rate,
        warmup_steps=round(WARM_UP * fit.steps),
        lr_scheduler_type="linear",
        max_grad_norm=GRADIENT_NORM,
        max_length=fit.max_tokens,
        lmbda=0.0,  # off-policy
        use_uld_loss=True,
        use_extended_uld=False,
        uld_use_hybrid_loss=True,
        uld_crossentropy_weight=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        teacher_tokenizer_name_or_path=source,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        seed=fit.random_seed,
        save_strategy="no",
        report_to="none",
        logging_steps=50,
    )
    rank = read_settings(adapter.path).r
    rows = [{"prompt": students.prompt(s.prompt), "completion": s.response} for s in samples]
    trainer: Any = GOLDTrainer(
        model=load_model(target, DTYPE),
        teacher_model=PeftModel.from_pretrained(load_model(source, DTYPE), adapter.path),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=students.tokenizer,
        peft_config=LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.teacher_tokenizer.eos_token = teachers.tokenizer.convert_ids_to_tokens(teachers.eos_id)
    own_format = {students.prompt(s.prompt): teachers.prompt(s.prompt) for s in samples}
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row: {"original_prompt_text": own_format[row["original_prompt_text"]]}
    )
    return trainer
