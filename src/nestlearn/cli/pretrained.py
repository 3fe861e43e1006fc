"""Loading pre-trained models for the commands that teach them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

Dtype = Literal["auto", "fp32", "bf16"]


def load_pretrained(name: str, dtype: Dtype = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Model (in evaluation mode) and tokenizer of a folder, a GGUF file or a Hugging Face id.

    ``dtype="auto"`` is what the weights are stored in, but float16, which CPUs are slow with,
    becomes bfloat16; and on a CPU that only emulates bfloat16 both become float32, if main memory
    has room for that. What was decided so is said on standard error.

    Raises:
        ValueError: nothing there, no causal language model, or no tokenizer.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where, more = _place(name)
    chosen: Any = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(dtype, "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **more)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=chosen, **_unpacked(more), **more)
    except (OSError, ValueError, ImportError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "unknown error")
        raise ValueError(
            f"cannot load {name!r}: {first.strip()} (give a folder with a saved model, a .gguf "
            "file or the id of a model on the Hugging Face hub)"
        ) from error
    if more:  # unpacked: an ordinary model from here on, which can be saved
        model.hf_quantizer = None  # type: ignore[assignment]
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    moved: Any = model.eval().to(device=device)
    if dtype == "auto" and device == "cpu" and model.dtype in (torch.bfloat16, torch.float16):
        moved = _fast_type(moved)
    return moved.to(torch.bfloat16) if moved.dtype == torch.float16 else moved, tokenizer


def _fast_type(model: Any) -> Any:
    """A 16-bit model in float32, where the CPU is faster with it and there is room."""
    import sys

    import torch

    from nestlearn.cli.machine import memory, processor, slow_with_bf16

    if not slow_with_bf16(processor()):
        return model
    more = 2 * sum(p.numel() for p in model.parameters())
    free = memory()["available"]
    said = "this CPU only emulates bfloat16"
    if free is not None and more > free // 2:
        print(f"{said}, and memory is too small for float32: expect it to be slow", file=sys.stderr)
        return model
    print(f"{said}: weights are held in float32, which is faster (--dtype bf16 keeps them small)",
          file=sys.stderr)  # fmt: skip
    return model.to(torch.float32)


def _place(name: str) -> tuple[str, dict[str, Any]]:
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no file {path}")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no model (no config.json)")
        return str(path), {}
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"no folder {name}")
    return name, {}


def _unpacked(more: dict[str, Any]) -> dict[str, Any]:
    """Newer versions of transformers leave GGUF weights packed unless told otherwise."""
    if "gguf_file" not in more:
        return {}
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def load_shapes(name: str) -> Any:
    """The model of a folder, a GGUF file or a Hugging Face id without its weights: on the device
    ``meta``, from the configuration alone, in the type that the configuration names.

    Raises:
        ValueError: nothing there, or nothing that transformers knows.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    import nestlearn.models.hope  # noqa: F401  (registers the architecture)
    from nestlearn.cli.generate import model_folder

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = Path(name).expanduser()
    where, more = _place(str(model_folder(path)) if path.is_dir() else name)
    try:
        config = AutoConfig.from_pretrained(where, **more)
        architecture = (getattr(config, "architectures", None) or [""])[0]
        known = getattr(transformers, architecture, None)
        make = AutoModelForCausalLM.from_config if known is None else known._from_config
        with torch.device("meta"):
            return make(config, dtype=config.dtype or torch.float32).eval()
    except (OSError, ValueError, ImportError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "unknown error")
        raise ValueError(
            f"cannot read {name!r}: {first.strip()} (give a folder with a saved model, a .gguf "
            "file or the id of a model on the Hugging Face hub)"
        ) from error
