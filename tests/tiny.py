"""Tiny tokenizers, models and adapters, built in a folder in moments; the same seed gives the same bytes."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from crosslora.config import Config, parse_config

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TEXT = """\
What will the weather be like in Paris tomorrow? Play the new album by the band. Book a table for two at seven.
Add this song to my playlist called Summer Evening. How many people live in the city? Tell me about the river.
{"intent": "GetWeather", "city": "Paris", "timeRange": "tomorrow"} {"intent": "PlayMusic", "artist": "the band"}
The answer is 42. There are 12 apples and 30 pears, so 12 + 30 = 42. Two words, three words;  four   words.
def add(left, right):
    return left + right
Grüße aus Zürich, où l'été est là. Привет, мир. 我们在这里。 Fünf schöne Wörter.
""".splitlines(keepends=True)


def byte_level_tokenizer(size: int = 384) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, no BOS (GPT-2 and SmolLM2 style)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def gemma_style_tokenizer(size: int = 512) -> PreTrainedTokenizerFast:
    """BPE over text with space marks, byte fallback, no dummy prefix, BOS from the post-processor."""
    tokenizer = Tokenizer(_bpe_with_fallback(size, ["<pad>", "<eos>", "<bos>", "<unk>"]))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _wrapped(tokenizer, bos="<bos>", eos="<eos>", pad="<pad>")


def llama_style_tokenizer(size: int = 512) -> PreTrainedTokenizerFast:
    """The same with a dummy prefix: a space before every text (Llama 2 style)."""
    tokenizer = Tokenizer(_bpe_with_fallback(size, ["<unk>", "<s>", "</s>"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(tokenizer, bos="<s>", eos="</s>", pad="<unk>")


def unigram_tokenizer(size: int = 448) -> PreTrainedTokenizerFast:
    """Unigram with Metaspace (dummy prefix) and byte fallback."""
    specials = ["<unk>", "<s>", "</s>"]
    learned, _ = _learned(size - 256 - len(specials))
    text = "".join(TEXT).replace(" ", "▁")
    # pieces from BPE and their frequencies, because the Unigram trainer gives other scores in every run
    scores = [(piece, math.log(max(1, text.count(piece)) / len(text))) for piece in learned]
    vocabulary = [(piece, 0.0) for piece in [*specials, *_byte_pieces()]] + scores
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _wrapped(tokenizer, bos="<s>", eos="</s>", pad="<unk>")


TOKENIZERS = {
    "byte_level": byte_level_tokenizer,
    "gemma_style": gemma_style_tokenizer,
    "llama_style": llama_style_tokenizer,
    "unigram": unigram_tokenizer,
}


def tiny_tokenizer(folder: Path, kind: str) -> Path:
    """One of TOKENIZERS, saved in a folder."""
    TOKENIZERS[kind]().save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A Llama with random weights, untied, and its byte-level tokenizer with a chat template."""
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=64,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    return _save(LlamaForCausalLM, config, tokenizer, folder, seed, dtype)


def tiny_gemma(folder: Path, seed: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    """A Gemma 3 text model with random weights, tied embeddings, sliding windows and BOS, without a chat template."""
    tokenizer = gemma_style_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=80,
        max_position_embeddings=512,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return _save(Gemma3ForCausalLM, config, tokenizer, folder, seed, dtype)


def tiny_lora(folder: Path, base_folder: Path, seed: int = 0, r: int = 4, alpha: int = 8) -> Path:
    """A PEFT LoRA on all linear layers but the head, with random factors: no matrix is zero."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    head = base.get_output_embeddings()
    linear = {
        n.rsplit(".", 1)[-1]
        for n, m in base.named_modules()
        if isinstance(m, torch.nn.Linear) and m is not head
    }
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=sorted(linear), task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    _sort_lists(Path(folder) / "adapter_config.json")
    return folder


def _sort_lists(file: Path) -> None:
    """PEFT writes the names of the modules as a set: in another order in every process."""
    content = json.loads(file.read_text())
    content["target_modules"] = sorted(content["target_modules"])
    file.write_text(json.dumps(content, indent=2, sort_keys=True))


def _save(
    model_class: type[PreTrainedModel],
    config: LlamaConfig | Gemma3TextConfig,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    seed: int,
    dtype: torch.dtype,
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_pieces() -> list[str]:
    return [f"<0x{value:02X}>" for value in range(256)]


def _bpe_with_fallback(size: int, specials: list[str]) -> models.BPE:
    """BPE trained on text with space marks, with the special and the byte pieces in front."""
    learned, merges = _learned(size - 256 - len(specials))
    pieces = [*specials, *_byte_pieces(), *learned]
    return models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )


def _learned(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces with space marks and the merges that give them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [tuple(pair) for pair in model["merges"]]


def _wrapped(tokenizer: Tokenizer, bos: str, eos: str, pad: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(list(dict.fromkeys([bos, eos, pad, "<unk>"])))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, unk_token="<unk>"
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


def write_benchmarks(folder: Path) -> None:
    """Six questions like MMLU's and two problems like GSM8K's, in the files that `crosslora evaluate` reads."""
    (folder / "mmlu/test").mkdir(parents=True)
    lines = [f"Which is number {i}?,one,two,three,four,{'ABCD'[i % 4]}" for i in range(6)]
    (folder / "mmlu/test/counting_test.csv").write_text("\n".join(lines) + "\n")
    problems = [json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) for i in range(7)]
    (folder / "gsm8k_train.jsonl").write_text("\n".join(problems[:5]) + "\n")
    (folder / "gsm8k_test.jsonl").write_text("\n".join(problems[5:]) + "\n")


def bare_config(**sections: Any) -> Config:
    """A configuration whose models nothing reads."""
    pair = {"source": {"base": "a/b"}, "adapters": [{"name": "a", "path": "a"}], "target": {"base": "c/d"}}
    return parse_config({"run": "run", **pair, **sections}, Path.cwd())
