"""Augmented views against torchvision: what is drawn, and the pixels that a row is replayed to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refuses
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from richkd.core.choices import AUGMENT, read_augment
from richkd.core.memory import ROWS_AT_ONCE
from richkd.data import augment as drawn
from richkd.data import replay as pixels
from richkd.data.augment import COMPONENTS, OPS, Augment, check_samples, param_faults
from richkd.data.mixing import joined
from richkd.data.views import AugmentedViews, PadCropFlip, ResizedCropFlip, apply_views, view_faults
from richkd.data.views import pad_crop_flip as one_view

POLICIES: dict[str, Any] = {"trivial": v2.TrivialAugmentWide(), "rand": v2.RandAugment()}
MANY = 40_000


def space(text: str, side: int = 32, sizes: Any = None) -> AugmentedViews:
    crops = PadCropFlip() if sizes is None else ResizedCropFlip(sizes, side)
    return AugmentedViews(crops, Augment(crops.name, text), side)


def columns(text: str, count: int = MANY, side: int = 32, seed: int = 0) -> dict[str, Any]:
    """Draw one view per sample; return its columns by name."""
    views = space(text, side).draw(seed, count, 1)[0]
    return dict(zip(Augment("pad-crop-flip", text).columns, views.T.astype(float), strict=True))


def close(drawn: Any, reference: Any) -> None:
    """Check that two samples have the same mean and deviation, within five standard errors."""
    a, b = np.asarray(drawn, float), np.asarray(reference, float)
    error = math.sqrt(a.var() / len(a) + b.var() / len(b))
    assert abs(a.mean() - b.mean()) < 5 * error + 1e-9
    spread = math.sqrt(np.var((a - a.mean()) ** 2) / len(a) + np.var((b - b.mean()) ** 2) / len(b))
    assert abs(a.var() - b.var()) < 5 * spread + 1e-9


# --- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trivial", "rand"])
@pytest.mark.parametrize("side", [32, 224])
def test_magnitudes_are_torchvisions(kind: str, side: int) -> None:
    own = drawn.magnitudes(kind, side)
    table = POLICIES[kind]._AUGMENTATION_SPACE
    assert tuple(table) == OPS
    for number, (name, (of, signed)) in enumerate(table.items()):
        theirs = of(drawn.BINS, side, side)
        expected = np.zeros(drawn.BINS) if theirs is None else theirs.double().numpy()
        scale = side if name.startswith("Translate") else 1
        assert np.allclose(own[number] * scale, expected, atol=1e-5), name
        assert not signed or drawn.SIGNED[number]
        assert signed or not drawn.SIGNED[number] or not own[number].any()  # the identity


@pytest.mark.parametrize("kind", ["trivial", "rand"])
def test_ops_bins_and_signs_have_torchvisions_frequencies(kind: str) -> None:
    found, names = columns(kind), [("op", "magnitude")]
    if kind == "rand":
        names = [("op_1", "magnitude_1"), ("op_2", "magnitude_2")]
    table = drawn.magnitudes(kind, 32)
    for op, magnitude in names:
        numbers, values = found[op].astype(int), found[magnitude]
        share = np.bincount(numbers, minlength=14) / MANY
        assert np.abs(share - 1 / 14).max() < 5 * math.sqrt(1 / 14 / MANY)
        for number, name in enumerate(OPS):
            of_op = values[numbers == number]
            bins = table[number] if kind == "trivial" else table[number, [9]]
            assert np.isin(np.round(np.abs(of_op), 4), np.round(bins, 4)).all(), name
            if drawn.SIGNED[number] and name != "Identity":
                some = of_op[of_op != 0]
                assert abs((some < 0).mean() - 0.5) < 2.5 / math.sqrt(len(some))
            else:
                assert (of_op >= 0).all()
            if kind == "trivial" and name in ("Rotate", "Solarize"):
                levels = np.abs(np.round(np.abs(of_op), 3)[:, None] - bins).argmin(1)
                counts = np.bincount(levels, minlength=31) / len(of_op)
                assert np.abs(counts - 1 / 31).max() < 5 * math.sqrt(1 / 31 / len(of_op))


def test_jitter_erasing_and_mixing_are_drawn_as_by_torchvision() -> None:
    image, count = [torch.zeros(3, 64, 64)], 300
    jitter = v2.ColorJitter(*drawn.JITTER)
    params = [jitter.make_params([]) for _ in range(count)]
    own = columns("jitter")
    for name in ("brightness", "contrast", "saturation", "hue"):
        close(own[name], [each[f"{name}_factor"] for each in params])
    orders = np.bincount(own["jitter_order"].astype(int), minlength=24) / MANY
    assert len(orders) == 24 and np.abs(orders - 1 / 24).max() < 5 * math.sqrt(1 / 24 / MANY)

    boxes = [v2.RandomErasing().make_params(image) for _ in range(count)]
    own = columns("erase", side=64)
    erased = own["erase_height"] > 0
    assert abs(erased.mean() - 0.5) < 2.5 / math.sqrt(MANY)
    for name, key in (("top", "i"), ("left", "j"), ("height", "h"), ("width", "w")):
        lengths = own[f"erase_{name}"][erased] * 64
        assert np.abs(lengths - np.rint(lengths)).max() < 1e-4  # whole pixels of the students'
        close(lengths, [box[key] for box in boxes])

    cuts = [v2.CutMix(num_classes=2).make_params(image) for _ in range(count)]
    own = columns("cutmix", side=64)
    close(own["share"], [cut["lam_adjusted"] for cut in cuts])
    for number, key in enumerate(("left", "top")):
        close(own[f"mix_{key}"] * 64, [cut["box"][number] for cut in cuts])
    area = own["mix_height"] * own["mix_width"]
    assert np.allclose(own["share"], 1 - area, atol=1e-6)
    blends = [v2.MixUp(num_classes=2).make_params(image)["lam"] for _ in range(count)]
    close(columns("mixup")["share"], blends)
    modes = columns("mix")["mix_mode"]
    assert {*modes} == {1, 2} and abs((modes == 1).mean() - 0.5) < 2.5 / math.sqrt(MANY)


def test_partners_are_other_samples_each_as_likely() -> None:
    partner = space("mixup").draw(3, 6, 162)[..., Augment("pad-crop-flip", "mixup").at["partner"]]
    for sample in range(6):
        counts = np.bincount(partner[:, sample].astype(int), minlength=6)
        assert counts[sample] == 0 and counts.sum() == 162
        assert (np.delete(counts, sample) > 10).all()


@pytest.mark.parametrize("photos", [False, True])
def test_a_draw_depends_on_seed_sample_and_view_alone(
    photos: bool, rng: np.random.Generator
) -> None:
    count, seed = ROWS_AT_ONCE + 9, int(rng.integers(2**32))
    sizes = rng.integers(20, 300, (count, 2)) if photos else None
    crops = PadCropFlip() if sizes is None else ResizedCropFlip(sizes, 64)
    text = "jitter+rand+erase+mix"
    whole = space(text, 64, sizes).draw(seed, count, 2)
    augment = space(text, 64, sizes).augment
    assert np.array_equal(
        whole[..., : augment.geometry], crops.draw(seed, count, 2).reshape(2, count, -1)
    )
    few = space(text, 64, None if sizes is None else sizes[:50]).draw(seed, 50, 1)[0]
    same = [name != "partner" for name in augment.columns]
    assert np.array_equal(few[:, same], whole[0, :50][:, same])
    assert not np.array_equal(whole[0][:, augment.geometry :], whole[1][:, augment.geometry :])
    alone = space("erase", 64, sizes).draw(seed, count, 2)[..., -4:]
    first = augment.at["erase_top"]
    assert np.array_equal(alone, whole[..., first : first + 4])
    fresh = space(text, 64, sizes).fresh(seed, 1, count)
    assert fresh.shape == whole.shape[1:] and not np.array_equal(fresh, whole[1])
    assert np.array_equal(fresh, space(text, 64, sizes).fresh(seed, 1, count))
    assert not [*param_faults(augment, whole, count)]


def test_components_are_read_in_one_order_and_checked() -> None:
    assert read_augment("crop") == read_augment(" crop ") == "crop"
    assert read_augment("mix+crop+erase+rand") == "rand+erase+mix"
    for text, value in (
        ("rand+zoom", "'zoom'"),
        ("", "''"),
        ("erase+erase", "erase is repeated"),
        ("rand+trivial", "rand and trivial"),
        ("mixup+cutmix", "mixup and cutmix"),
    ):
        with refuses("augment-components", value, *AUGMENT):
            read_augment(text)
    mixing = Augment("pad-crop-flip", "mixup")
    check_samples(mixing, 2)
    check_samples(None, 1)
    for count in (1, 2**24 + 1):
        with refuses("augment-samples", "mixup", f"{count:,}"):
            check_samples(mixing, count)


@pytest.mark.parametrize(
    ("column", "value", "fault"),
    [
        ("op_2", 14, "op_2 are not in 0..13"),
        ("op_1", 0.5, "op_1 are not whole"),
        ("jitter_order", 24, "jitter_order"),
        ("erase_top", 0.9, "boxes of erase"),
        ("mix_left", -1, "boxes of mix"),
        ("partner", 20, "partner are not in 0..19"),
        ("partner", 7, "mixed with themselves"),
        ("share", 1.5, "share"),
        ("mix_mode", 3, "mix_mode"),
        ("hue", 3, "hue are not in -0.5..0.5"),
        ("contrast", float("nan"), "contrast"),
        ("magnitude_1", 300, "magnitude_1 are out of range"),
        ("view_id", 162, "not in 0..161"),
    ],
)
def test_rows_that_no_replay_takes_are_found(column: str, value: float, fault: str) -> None:
    own = space("jitter+rand+erase+mix")
    views = own.draw(0, 20, 2)
    views[1, 7, own.augment.at["erase_height"]] = 0.2
    views[1, 7, own.augment.at[column]] = value
    assert any(fault in each for each in view_faults("pad-crop-flip", own.augment, views, 20))
    some = np.array([3, 7, 11])  # of view 1, some samples
    found = view_faults("pad-crop-flip", own.augment, views[1, some], 20, samples=some)
    assert any(fault in each for each in found)


def test_boxes_beyond_an_image_are_found() -> None:
    sizes = np.array([[30, 40], [50, 60]])
    views = ResizedCropFlip(sizes, 24).draw(0, 2, 3)
    assert not [*view_faults("resized-crop-flip", None, views, 2, sizes)]
    for column, value in ((0, 29), (1, -1), (2, 51), (3, math.inf), (4, 2)):
        forged = views.copy()
        forged[2, 1, column] = value
        assert [*view_faults("resized-crop-flip", None, forged, 2, sizes)] == [
            "1 boxes are empty or out of range"
        ]


# --- what a row is replayed to -------------------------------------------------------------------


def photo(rng: np.random.Generator, side: int) -> Any:
    """Smooth noise, on which interpolation and histograms matter."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8))
    return np.array(coarse.resize((side, side), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("kind", ["trivial", "rand"])
@pytest.mark.parametrize("side", [32, 224])
def test_ops_give_torchvisions_pixels(kind: str, side: int, rng: np.random.Generator) -> None:
    image = Image.fromarray(photo(rng, side))
    policy = POLICIES[kind]
    table = drawn.magnitudes(kind, side).astype(np.float32)
    for number, (name, (_, signed)) in enumerate(policy._AUGMENTATION_SPACE.items()):
        for level in range(0, drawn.BINS, 5):
            for sign in (1, -1) if signed else (1,):
                magnitude = float(sign * table[number, level])
                moved = name.startswith("Translate")  # by a share of the side
                expected = policy._apply_image_or_video_transform(
                    image,
                    name,
                    round(magnitude * side, 4) if moved else magnitude,
                    policy.interpolation,
                    policy._fill,
                )
                found = pixels.apply_op(image, number, magnitude)
                assert np.array_equal(found, expected), (name, level, sign)


def test_a_whole_row_gives_the_pixels_of_torchvisions_transforms(rng: np.random.Generator) -> None:
    """Every component of a row, read here by its columns, through torchvision's own transforms."""
    side, own = 48, space("jitter+trivial+erase+mix", 48)
    images = np.stack([photo(rng, side) for _ in range(12)])
    augment, views = own.augment, own.draw(int(rng.integers(2**32)), 12, 1)[0]
    rows = joined(augment, torch.from_numpy(views))

    def alone(sample: int) -> torch.Tensor:
        row = dict(zip(augment.columns, views[sample].tolist(), strict=True))
        crop = apply_views(torch.from_numpy(images[sample])[None], torch.tensor([row["view_id"]]))
        image = functional.to_pil_image(crop[0].permute(2, 0, 1))
        jitter = {f"{name}_factor": row[name] for name in drawn.JITTER_COLUMNS[1:]}
        order = torch.tensor(drawn.ORDERS[int(row["jitter_order"])])
        image = v2.ColorJitter(*drawn.JITTER).transform(image, {"fn_idx": order, **jitter})
        name, policy = OPS[int(row["op"])], POLICIES["trivial"]
        magnitude = row["magnitude"]
        if name.startswith("Translate"):
            magnitude = round(magnitude * side, 3)
        image = policy._apply_image_or_video_transform(
            image, name, magnitude, policy.interpolation, policy._fill
        )
        box = [round(row[f"erase_{part}"] * side) for part in drawn.BOX]
        nothing = torch.zeros(1, 1, 1)
        erasing = dict(zip("ijhw", box, strict=True))
        tensor = functional.pil_to_tensor(image)
        return v2.RandomErasing().transform(tensor, {**erasing, "v": nothing})  # type: ignore[no-any-return]

    def crops(sample: int, geometry: torch.Tensor) -> torch.Tensor:
        same = torch.from_numpy(images[sample])[None].repeat(len(geometry), 1, 1, 1)
        return apply_views(same, geometry[:, 0])

    for sample in range(12):
        row = dict(zip(augment.columns, views[sample].tolist(), strict=True))
        pair = torch.stack([alone(int(row["partner"])), alone(sample)])  # rolled by one
        found = pixels.replay(augment, rows[sample][None], sample, crops)[0]
        if row["mix_mode"] == drawn.CUTMIX:
            top, left, height, width = (round(row[f"mix_{part}"] * side) for part in drawn.BOX)
            box = (left, top, left + width, top + height)
            labels = torch.zeros(2, dtype=torch.int64)
            params = {"labels": labels, "batch_size": 2, "box": box, "lam_adjusted": row["share"]}
            expected = v2.CutMix(num_classes=2).transform(pair, params)[1]
            assert torch.equal(found, expected.permute(1, 2, 0))
        else:
            share = row["share"]
            expected = share * pair[1].double() + (1 - share) * pair[0].double()
            distance = (found.double() - expected.permute(1, 2, 0)).abs()
            assert distance.max() < 0.5 + 255 / pixels.SHARES


def test_a_network_of_twice_the_size_sees_the_same_content(rng: np.random.Generator) -> None:
    """Moves, boxes and mixes are of the side; pixels of an enlarged image are enlarged ones."""
    own = space("trivial+erase+mix", 32)
    augment, image = own.augment, photo(rng, 32)
    other = photo(rng, 32)
    moves = {OPS.index("TranslateX"), OPS.index("TranslateY"), OPS.index("Posterize")}
    compared = 0
    for row in own.draw(0, 400, 1)[0].tolist():
        shift = row[augment.at["magnitude"]] * 32
        if int(row[augment.at["op"]]) not in moves or abs(shift - round(shift)) > 1e-3:
            continue
        seen = []
        for factor in (1, 2):
            large = [each.repeat(factor, 0).repeat(factor, 1) for each in (image, other)]
            both = [pixels.altered(augment, each, row) for each in large]
            mix = row[augment.at["mix_mode"] : augment.width]
            seen.append(pixels.mixed(*both, mix))
        assert np.array_equal(seen[0].repeat(2, 0).repeat(2, 1), seen[1])
        compared += 1
    assert compared > 20


def test_one_crop_is_that_of_the_gather(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (17, 23, 3), np.uint8)
    every = apply_views(torch.from_numpy(image)[None].repeat(162, 1, 1, 1), torch.arange(162))
    for view_id in range(162):
        assert np.array_equal(one_view(image, view_id), every[view_id])
    with refuses("views-not-ids", "view_images"):
        apply_views(torch.zeros(2, 8, 8, 3), torch.zeros(2, 5))


def test_columns_of_every_component_have_one_place() -> None:
    for text in ("jitter+trivial+erase+mixup", "rand+cutmix"):
        augment = Augment("resized-crop-flip", text)
        assert len({*augment.columns}) == augment.width == len(augment.at)
        assert augment.columns[5] == COMPONENTS[text.split("+")[0]].columns[0]
        assert augment.width - augment.unmixed == 7
