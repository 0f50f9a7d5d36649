"""Train a small CLIP from images and captions: a real open_clip model, in a minute on a processor.

It stands in for a pretrained CLIP where none can be downloaded: in the demo, in tests, and for
small images that no public CLIP has seen. What it writes is what open_clip itself loads with
`local-dir:PATH` (model, preprocessing and the usual tokenizer), so nothing downstream knows the
difference.

Covered: images of 32×32 pixels; open_clip's ResNet, text transformer and contrastive loss;
the same weights, bit for bit, for the same arguments, software and number of threads on the CPU,
also where the training was interrupted and resumed.
Not covered: other sizes, several devices, mixed precision, validation while training.
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
"""Tokens a caption may have, with its two marks; open_clip's tokenizer cuts off the rest."""
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

    The directory appears when everything is in it; whatever goes wrong before leaves nothing.

    Args:
        images: uint8 [N, 32, 32, 3], RGB.
        captions: N captions. The same caption may occur many times. What most captions mention is
            learned first, so classes are learned soonest from captions that say little else.
        out: The directory to create; its parents are created too.
        epochs: Passes over the pairs; what is left of a pass after the last full batch is skipped.
        batch_size: Pairs contrasted with each other.
        lr: The highest learning rate of the vision tower, reached after a tenth of the steps; the
            text tower learns at a twentieth of it.
        layers: Residual blocks of the vision tower, at least 4: they are spread over its four
            stages, the earlier ones first.
        width: Channels of the vision tower's first stage, even; the other stages follow from it.
        seed: Of the first weights and of the order of the pairs.
        device: Where to train.
        progress: Called after every step with the steps done and their total, those of before
            among them.
        checkpoints: Where one is written after every epoch, and resumed from; they are of a
            training with these very arguments.

    Raises:
        RichKDError: no checkpoint that is there can be read.
        ValueError: The images have another shape or type, there are fewer of them than a batch
            or not as many as captions, or a number is out of range.
        FileExistsError: `out` exists.
    """
    _check_pairs(images, captions, batch_size)
    if epochs < 1 or not 0 < lr < math.inf:
        raise ValueError(f"epochs and lr must be positive, got {epochs} and {lr}")
    if layers < 4 or width < 2 or width % 2:
        raise ValueError(f"layers must be 4 or more and width even, got {layers} and {width}")
    if out.exists():
        raise FileExistsError(f"{out} exists; a CLIP is written to a new directory")
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
    """What `open_clip_config.json` says."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": IMAGE_SIZE,
                # A list makes it open_clip's ResNet; on so few images a transformer of the same
                # cost learns a third as much.
                "layers": [(layers + 3 - stage) // 4 for stage in range(4)],
                "width": width,
            },
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": 49408,  # that of open_clip's own tokenizer
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
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None,
    checkpoints: Checkpoints | None,
) -> nn.Module:
    # open_clip takes seconds to import, more than a check of the arguments should.
    from open_clip import ClipLoss, SimpleTokenizer
    from open_clip.model import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = CLIP(**config["model_cfg"], output_dict=True)
    tokens = SimpleTokenizer(context_length=CONTEXT_LENGTH)(list(captions))
    # Train the embeddings of the words that occur, a few hundred of 49,408; the optimiser would
    # spend longer on the others than on all the rest. `unique` sorts, so the end mark remains the
    # largest token, by which open_clip finds it.
    vocabulary, tokens = tokens.unique(return_inverse=True)
    every_word = model.token_embedding.weight.detach()
    model.token_embedding.weight = nn.Parameter(every_word[vocabulary])

    model.to(device).train()
    images, tokens = images.to(device), tokens.to(device)
    mean, std = (255 * torch.tensor(value, device=device) for value in (MEAN, STD))
    steps = epochs * (len(images) // batch_size)
    optimizer, factor = _optimizer(model, lr, steps)
    with torch.no_grad():  # fresh towers send everything one way: begin around the mean instead
        some = ((images[:512] - mean) / std).permute(0, 3, 1, 2)
        model.visual.attnpool.c_proj.bias -= model.encode_image(some).mean(0)
        model.text_projection.bias -= model.encode_text(tokens[:512]).mean(0)
    loss_of = ClipLoss()
    generator = torch.Generator().manual_seed(seed)
    done = step = 0
    if checkpoints is not None and checkpoints.files:
        found, state = checkpoints.load(lambda _: None)
        _resume(model, optimizer, state)
        done = found.epoch
        for _ in range(done):
            torch.randperm(len(images), generator=generator)
        step = done * (len(images) // batch_size)
    for epoch in range(done + 1, epochs + 1):
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - batch_size + 1, batch_size):
            index = order[start : start + batch_size].to(device)
            pixels = ((images[index] - mean) / std).permute(0, 3, 1, 2)
            loss = loss_of(**model(pixels, tokens[index]))
            for group in optimizer.param_groups:
                group["lr"] = group["highest_lr"] * factor(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():  # as in CLIP: a temperature below 1/100 is not stable
                model.logit_scale.clamp_(0, math.log(100))
            step += 1
            if progress is not None:
                progress(step, steps)
        if checkpoints is not None:
            checkpoints.save(Progress(epoch), _state(model, optimizer))

    model.cpu()
    every_word[vocabulary] = model.token_embedding.weight.detach()
    model.token_embedding.weight = nn.Parameter(every_word)
    trained: nn.Module = model
    return trained


def _state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Every tensor that resuming needs."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            tensors[f"{kind}.{name}"] = value
    return tensors


def _resume(model: nn.Module, optimizer: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Go on from what `_state` gave."""
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
    """AdamW, without decay for biases, norms and the temperature; warm-up, then a cosine."""
    # A text tower as fast as the vision tower soon says the same of all classes that the images do
    # not tell apart yet, and then nothing urges the images to.
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
