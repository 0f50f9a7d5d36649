"""Train a small CLIP on images and captions: a real open_clip model, in a minute on a CPU.

It replaces a pretrained CLIP if none can be downloaded: in the demo, in tests, and for small images
unlike any that public CLIPs were trained on. open_clip loads it with `local-dir:PATH` (model,
preprocessing and the usual tokenizer) like any other.

Supported: images of 32×32 pixels, with open_clip's ResNet, text transformer and contrastive loss.
The same arguments, software and number of threads give bitwise the same weights on the CPU, even
after an interruption.
Not supported: other sizes, several devices, mixed precision, validation during training.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from richkd.core.interrupts import mark_work_started
from richkd.training.checkpoint import Checkpoints, Progress

IMAGE_SIZE: Final = 32
CONTEXT_LENGTH: Final = 32
"""Tokens per caption, with start and end marks; open_clip's tokenizer truncates the rest."""
MEAN: Final = (0.5, 0.5, 0.5)
STD: Final = (0.25, 0.25, 0.25)


def train_tiny_clip(
    images: Tensor,
    captions: Sequence[str],
    out: Path,
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 3e-3,
    layers: int = 4,
    width: int = 16,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train a CLIP on pairs of images and captions, and write it to `out` for open_clip.

    The directory is created only when it is complete; a failure leaves nothing behind.

    Args:
        images: uint8 [N, 32, 32, 3], RGB.
        captions: N captions, which may repeat. What most captions mention is learned first, so
            classes are learned fastest from captions that mention little else.
        out: the directory to create, with its parents.
        epochs: passes over the pairs; each drops an incomplete last batch.
        batch_size: pairs that are contrasted with each other.
        lr: the highest learning rate of the vision tower, reached after a tenth of the steps; that
            of the text tower is a twentieth of it.
        layers: residual blocks of the vision tower's four stages, at least 4; early ones get more.
        width: channels of the vision tower's first stage, an even number; the other stages follow.
        seed: of the initial weights and the order of the pairs.
        device: where to train.
        progress: called after every step with the numbers of steps done and of all steps.
        checkpoints: where to write a checkpoint after every epoch and resume from; they must come
            from a training with the same arguments.

    Raises:
        RichKDError: none of the checkpoints can be read.
        ValueError: images and captions do not fit each other, or a number is out of range.
        FileExistsError: `out` exists.
    """
    _check_pairs(images, captions, batch_size)
    if epochs < 1 or not 0 < lr < math.inf:
        raise ValueError(f"epochs and lr must be positive, got {epochs} and {lr}")
    if out.exists():
        raise FileExistsError(f"{out} exists; give a new directory")
    config = _config(layers, width)
    model = _train(
        images,
        captions,
        config,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        device=torch.device(device),
        progress=progress,
        checkpoints=checkpoints,
    )
    _write(model, config, out)


def _check_pairs(images: Tensor, captions: Sequence[str], batch_size: int) -> None:
    if images.dtype != torch.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"images must be uint8 [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3], "
            f"got {images.dtype} {list(images.shape)}"
        )
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images need as many captions, got {len(captions)}")
    if not 2 <= batch_size <= len(images):
        raise ValueError(f"batch_size must be in 2..{len(images)} (the images), got {batch_size}")


def _config(layers: int, width: int) -> dict[str, Any]:
    """Return the content of `open_clip_config.json`."""
    if layers < 4 or width < 2 or width % 2:
        raise ValueError(f"layers must be 4 or more and width even, got {layers} and {width}")
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": IMAGE_SIZE,
                # a list selects open_clip's ResNet; on so few images, a transformer of the same
                # cost learns a third as much
                "layers": [(layers + 3 - stage) // 4 for stage in range(4)],
                "width": width,
            },
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": 49408,  # of open_clip's own tokenizer
                "width": 64,
                "heads": 2,
                "proj_bias": True,
                "layers": 1,
            },
        },
        "preprocess_cfg": {"size": IMAGE_SIZE, "mean": list(MEAN), "std": list(STD)},
    }


def _train(
    images: Tensor,
    captions: Sequence[str],
    config: dict[str, Any],
    *,
    seed: int,
    device: torch.device,
    **fitting: Any,
) -> nn.Module:
    """Return a model trained by `_fit`, with the embeddings of all words."""
    # open_clip takes seconds to import, too long for a check of the arguments
    from open_clip import SimpleTokenizer
    from open_clip.model import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = CLIP(**config["model_cfg"], output_dict=True)
    tokens = SimpleTokenizer(context_length=CONTEXT_LENGTH)(list(captions))
    # train only the embeddings of the words that occur, a few hundred of 49,408, since the
    # optimiser would spend most of its time on the others; `unique` sorts, so the end mark remains
    # the largest token, by which open_clip finds it
    vocabulary, tokens = tokens.unique(return_inverse=True)
    every_word = model.token_embedding.weight.detach()
    model.token_embedding.weight = nn.Parameter(every_word[vocabulary])

    model.to(device).train()
    images, tokens = images.to(device), tokens.to(device)
    with torch.no_grad():  # untrained towers map all inputs close together: subtract the mean
        model.visual.attnpool.c_proj.bias -= model.encode_image(_pixels(images[:512])).mean(0)
        model.text_projection.bias -= model.encode_text(tokens[:512]).mean(0)
    _fit(model, images, tokens, seed=seed, **fitting)

    model.cpu()
    every_word[vocabulary] = model.token_embedding.weight.detach()
    model.token_embedding.weight = nn.Parameter(every_word)
    trained: nn.Module = model
    return trained


def _pixels(images: Tensor) -> Tensor:
    """Normalise images: uint8 [B,32,32,3] -> [B,3,32,32]."""
    mean, std = (255 * torch.tensor(value, device=images.device) for value in (MEAN, STD))
    return ((images - mean) / std).permute(0, 3, 1, 2)


def _fit(
    model: Any,
    images: Tensor,
    tokens: Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    progress: Callable[[int, int], None] | None,
    checkpoints: Checkpoints | None,
) -> None:
    """Train the model in place, from the last checkpoint if there is one."""
    from open_clip import ClipLoss

    steps_per_epoch = len(images) // batch_size
    steps = epochs * steps_per_epoch
    optimizer, factor = _optimizer(model, lr, steps)
    contrast = ClipLoss()
    generator = torch.Generator().manual_seed(seed)
    done = 0
    if checkpoints is not None and checkpoints.files:
        found, state = checkpoints.load(lambda _: None)
        _resume(model, optimizer, state)
        done = found.epoch
    for _ in range(done):
        torch.randperm(len(images), generator=generator)
    step = done * steps_per_epoch
    for epoch in range(done + 1, epochs + 1):
        order = torch.randperm(len(images), generator=generator)
        for batch in torch.split(order[: steps_per_epoch * batch_size], batch_size):
            index = batch.to(images.device)
            loss = contrast(**model(_pixels(images[index]), tokens[index]))
            for group in optimizer.param_groups:
                group["lr"] = group["highest_lr"] * factor(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():  # as in CLIP: temperatures below 1/100 are unstable
                model.logit_scale.clamp_(0, math.log(100))
            step += 1
            if progress is not None:
                progress(step, steps)
        if checkpoints is not None:
            checkpoints.save(Progress(epoch), _state(model, optimizer))


def _state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return every tensor that is needed to resume."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            tensors[f"{kind}.{name}"] = value
    return tensors


def _resume(model: nn.Module, optimizer: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `_state` returned."""
    own = model.state_dict()
    model.load_state_dict({name: tensors[f"model.{name}"] for name in own})
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            kind: tensors[f"{kind}.{name}"].to(parameter.device)
            for kind in ("step", "exp_avg", "exp_avg_sq")
        }


def _optimizer(
    model: nn.Module, lr: float, steps: int
) -> tuple[torch.optim.AdamW, Callable[[int], float]]:
    """Return AdamW without decay of vectors and scalars, and its schedule: warm-up, then cosine."""
    # a text tower as fast as the vision tower would merge classes that the images do not separate
    # yet, which would leave the vision tower no reason to separate them
    groups = [
        {
            "params": [
                parameter
                for name, parameter in model.named_parameters()
                if name.startswith("visual.") == vision and (parameter.ndim > 1) == decays
            ],
            "highest_lr": lr if vision else lr / 20,
            "weight_decay": 0.1 if decays else 0.0,
        }
        for vision in (True, False)
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return optimizer, factor


def _write(model: nn.Module, config: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    mark_work_started()
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as workplace:
        part = Path(workplace) / out.name
        part.mkdir()
        text = json.dumps(config, indent=2) + "\n"
        (part / "open_clip_config.json").write_text(text, encoding="utf-8")
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, part / "open_clip_model.safetensors")
        part.replace(out)
