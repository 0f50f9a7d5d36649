"""Both stages of RichKD in the open, on a few hundred drawings.

Stage one runs a CNN teacher and CLIP once and writes their outputs to a Zarr group. Stage two reads
it slab by slab and trains students, with no teacher in memory. `richkd precompute` and `richkd
distill` do the same, and add what long jobs need: checksums, resuming, many datasets and methods.

Run it with `python docs/two_stages.py`. It takes under a minute on a CPU and downloads nothing.
At this size the accuracies only show that it works.
"""

import tempfile
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
import zarr

import richkd
from richkd.core import fusion
from richkd.data import shapes
from richkd.data.prompts import PROMPT_SETS
from richkd.data.views import PadCropFlip
from richkd.losses import CRDLoss, kd_loss
from richkd.losses.crd import Embed
from richkd.teachers.tiny_clip import train_tiny_clip

N, V, C = 512, 12, len(shapes.CLASS_NAMES)  # training samples, views of each, classes
ALPHA, TAU = 0.5, 3.0  # weight of the CNN teacher in the blend, temperature of distillation


def pixels(images):
    """uint8 [B,H,W,3] -> f32 [B,3,H,W], centred and scaled."""
    return (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25


def drawings(count, seed):
    """uint8 images [count,32,32,3] and labels [count]."""
    drawing = shapes.draw(count, seed=seed)
    return torch.from_numpy(drawing.images), torch.from_numpy(drawing.labels)


# --- stage one: ask both teachers once ------------------------------------------------------------


def train_teacher(images, labels):
    """A resnet8 trained on the labels; every epoch shows a new view of every image."""
    teacher = richkd.create_model("resnet8", C)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for view in torch.from_numpy(PadCropFlip().draw(1, N, 2 * V)).long():
        shown = richkd.apply_views(images, view)
        for index in torch.randperm(N).split(64):
            loss = F.cross_entropy(teacher(pixels(shown[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return teacher.eval()


def make_clip(folder):
    """A tiny CLIP trained on captions of other drawings; any open_clip model could replace it."""
    drawing = shapes.draw(4000, seed=3)
    train_tiny_clip(torch.from_numpy(drawing.images), drawing.captions, folder, epochs=3)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.inference_mode()
def class_embeddings(clip, tokenizer):
    """One unit vector per class [C,D]: the mean over the embeddings of its prompts, normalised."""
    prompts = PROMPT_SETS["richkd"]
    texts = [prompt.format(name) for name in shapes.CLASS_NAMES for prompt in prompts]
    embeddings = F.normalize(clip.encode_text(tokenizer(texts)), dim=-1)
    return fusion.class_embeddings(embeddings.reshape(C, len(prompts), -1))


@torch.inference_mode()
def precompute(cache, teacher, clip, classes, images, labels):
    """Write both teachers' outputs. Arrays are [view, sample, …], so that an epoch is one slab."""
    features = F.normalize(clip.encode_image(pixels(images)), dim=-1)  # clean images, once
    similarity = fusion.clip_similarity(features, classes)
    scale = clip.logit_scale.exp().item()  # CLIP's own; the released code blends with 1
    rows = {"view_ids": [], "teacher_features": [], "fused_logits": []}
    for view in torch.from_numpy(PadCropFlip().draw(0, N, V)).long():  # none twice for a sample
        logits, pooled = richkd.forward(teacher, pixels(richkd.apply_views(images, view)))
        rows["view_ids"].append(view)
        rows["teacher_features"].append(pooled.half())
        rows["fused_logits"].append(fusion.fuse_logits(logits, similarity, ALPHA, scale).half())
    for name, slabs in rows.items():
        values = torch.stack(slabs).numpy()
        cache.create_array(name, data=values, chunks=(1, *values.shape[1:]))
    for name, values in (("images", images), ("labels", labels), ("clip_features", features)):
        cache.create_array(name, data=values.numpy())


# --- stage two: train students from the cache alone -----------------------------------------------


def distill(cache, w_logit, w_feature):
    """A resnet8 on CE + w_logit · KL(fused logits) + w_feature · CRD(fused features)."""
    whole = ("images", "labels", "clip_features")
    images, labels, clip = (torch.from_numpy(cache[name][:]) for name in whole)
    student = richkd.create_model("resnet8", C)
    widths = student.num_features, cache["teacher_features"].shape[-1], clip.shape[-1]
    embed_student, embed_teacher, embed_clip = embeds = torch.nn.ModuleList(map(Embed, widths))
    crd = CRDLoss(N, 128, num_negatives=256, labels=labels)
    optimizer = torch.optim.Adam([*student.parameters(), *embeds.parameters()], lr=3e-3)
    for view in range(V):  # an epoch is one slab: view v of every sample, read at once
        slab = ("view_ids", "teacher_features", "fused_logits")
        ids, pooled, fused_logits = (torch.from_numpy(cache[name][view]) for name in slab)
        shown = richkd.apply_views(images, ids)  # the views that these rows were computed on
        for index in torch.randperm(N).split(64):
            logits, features = richkd.forward(student, pixels(shown[index]))
            loss = F.cross_entropy(logits, labels[index])
            loss += w_logit * kd_loss(logits, fused_logits[index], TAU)
            sides = embed_teacher(pooled[index]), embed_clip(clip[index])
            fused_features = fusion.fuse_features(*sides, ALPHA)
            loss += w_feature * crd(embed_student(features), fused_features, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            crd.update()  # the memory banks, after the backward pass
    return student.eval()


def main(folder):
    """Run both stages and print the test accuracy of the teachers and the students."""
    torch.manual_seed(0)
    cache = zarr.create_group(folder / "cache.zarr")
    images, labels = drawings(N, seed=1)
    teacher, (clip, tokenizer) = train_teacher(images, labels), make_clip(folder / "clip")
    classes = class_embeddings(clip, tokenizer)
    precompute(cache, teacher, clip, classes, images, labels)

    images, labels = drawings(500, seed=2)
    with torch.inference_mode():
        cosines = F.normalize(clip.encode_image(pixels(images)), dim=-1) @ classes.T
        test = {"CNN teacher": teacher(pixels(images)), "CLIP": cosines}
        scale = clip.logit_scale.exp().item()
        test["fused"] = fusion.fuse_logits(test["CNN teacher"], cosines, ALPHA, scale)
    for name, *weights in (("CE", 0, 0), ("RichKD L", 3, 0), ("RichKD L+F", 3, 0.8)):
        test[f"student by {name}"] = distill(cache, *weights)(pixels(images)).detach()
    for name, logits in test.items():
        print(f"{name}: {100 * (logits.argmax(1) == labels).float().mean():.1f} %")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
