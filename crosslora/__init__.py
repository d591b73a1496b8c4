"""crosslora moves a LoRA adapter to another base model without its training data.

import crosslora
result = crosslora.transfer(crosslora.load_config("transfer.yaml"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_config", "transfer"]

if TYPE_CHECKING:
    from crosslora.config import load_config
    from crosslora.pipeline import transfer


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import crosslora` loads no torch, Ray or vLLM."""
    if name == "transfer":
        from crosslora.pipeline import transfer

        return transfer
    if name == "load_config":
        from crosslora.config import load_config

        return load_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
