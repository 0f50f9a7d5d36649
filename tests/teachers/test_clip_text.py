"""What texts need: tokenizers and text models from Hugging Face, against plain open_clip."""

import json
import re
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import refuses, save_tensors, write_clip
from optional import load, require
from PIL import Image

from richkd.core.errors import RichKDError
from richkd.data.prompts import fill, load_prompts
from richkd.teachers.clip import blank_clip, check_clip, load_clip

CPU = torch.device("cpu")
EXTRA = "pip install 'richkd[tokenizers]'"
FindSpec = Callable[[str], object]


def without(*modules: str) -> FindSpec:
    """As where these packages are not installed, and all others are."""
    return lambda name: None if name in modules else find_spec("json")


EVERYTHING = without()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- before anything is loaded -------------------------------------------------------------------

PAIRS = open_clip.list_pretrained()


def needs_transformers(model: str) -> bool:
    """By open_clip's own rule for tokenizers (get_tokenizer) and text towers."""
    text = open_clip.get_model_config(model)["text_cfg"]  # type: ignore[index]
    return bool(
        text.get("hf_tokenizer_name") or text.get("hf_model_name") or "siglip" in model.lower()
    )


@pytest.mark.usefixtures("no_network")
def test_every_clip_of_open_clips_is_taken_or_has_a_remedy_that_is() -> None:
    """All pairs, with transformers and without."""
    remedied = set()
    for model, tag in PAIRS:
        try:
            check_clip(f"{model}:{tag}", EVERYTHING)
        except RichKDError as error:
            found = re.search(r"; use (\S+):(\S+)$", str(error))
            assert found, error
            assert found.groups() in PAIRS and found.groups() != (model, tag)
            check_clip(":".join(found.groups()), EVERYTHING)
            remedied.add((model, tag))
    assert 20 < len(remedied) < len(PAIRS) / 3
    assert ("roberta-ViT-B-32", "laion2b_s12b_b32k") not in remedied
    refused = 0
    for model, tag in PAIRS:
        if (model, tag) in remedied:
            continue
        if needs_transformers(model):
            with refuses("clip-tokenizer-missing", model, "transformers", EXTRA):
                check_clip(f"{model}:{tag}", without("transformers"))
            refused += 1
        else:
            check_clip(f"{model}:{tag}", without("transformers"))
    assert refused > 40


@pytest.mark.usefixtures("no_network")
def test_every_configuration_of_open_clips() -> None:
    """Each of the models, many of which have no weights at all, is taken or refused in one line."""
    codes: dict[str, int] = {}
    for model in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(model)
        try:
            check_clip(f"{model}:{tags[0]}" if tags else model, without("transformers"))
        except RichKDError as error:
            assert "\n" not in str(error) and model in str(error)
            codes[error.code] = codes.get(error.code, 0) + 1
            assert (error.code == "clip-tag-unknown") == (not tags)
            assert error.code != "clip-tokenizer-missing" or needs_transformers(model)
    assert {*codes} == {"clip-tag-unknown", "clip-activation", "clip-tokenizer-missing"}


def test_tokenizers_are_named_before_anything_is_fetched() -> None:
    for name, needed in (
        ("ViT-B-16-SigLIP2:webli", ["tokenizer timm/ViT-B-16-SigLIP2"]),
        ("xlm-roberta-base-ViT-B-32:laion5b_s13b_b90k", ["xlm-roberta-base"]),
        ("roberta-ViT-B-32:laion2b_s12b_b32k", ["roberta-base"]),
    ):
        with refuses("clip-tokenizer-missing", name, "install transformers", EXTRA, *needed):
            check_clip(name, without("transformers"))
    name = "nllb-clip-base-siglip:v1"
    check_clip(name, without("sentencepiece"))  # its repository has a tokenizer.json


def test_what_sentencepiece_reads(tmp_path: Path) -> None:
    folder = with_text(write_clip(tmp_path / "clip"), hf_tokenizer_name="google/mt5-base")
    (folder / "spiece.model").write_bytes(b"")
    with refuses("clip-tokenizer-missing", folder, "sentencepiece and protobuf", EXTRA):
        check_clip(str(folder), without("sentencepiece", "google.protobuf"))
    with refuses("clip-tokenizer-missing", folder, "install protobuf", EXTRA):
        check_clip(str(folder), without("google"))
    check_clip(str(folder), EVERYTHING)


def with_text(folder: Path, **text: Any) -> Path:
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"] |= text
    file.write_text(json.dumps(config))
    return folder


def test_a_directory_with_a_tokenizer_of_hugging_faces(tmp_path: Path) -> None:
    folder = with_text(write_clip(tmp_path / "clip"), hf_tokenizer_name="some/tokenizer")
    both = "some/tokenizer", EXTRA, "copy", "tokenizer.json"
    with refuses("clip-tokenizer-missing", folder, *both):
        check_clip(str(folder), without("transformers"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(RichKDError, match=re.escape(EXTRA) + "$"):
        check_clip(str(folder), without("transformers"))
    check_clip(str(folder), EVERYTHING)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RichKDError, match=r"tokenizer\.json") as refused:
        check_clip(str(folder), EVERYTHING)
    assert "pip install" not in str(refused.value)


def test_a_directory_called_siglip_needs_nothing(tmp_path: Path) -> None:
    """As open_clip has it: only its own names say which tokenizer there is."""
    check_clip(str(write_clip(tmp_path / "ViT-SigLIP")), without("transformers"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model_cfg": {}}', '{"model_cfg": {"text_cfg": 3}}']
)
def test_a_configuration_that_is_none(tmp_path: Path, content: str) -> None:
    folder = write_clip(tmp_path / "clip")
    (folder / "open_clip_config.json").write_text(content)
    with refuses("clip-config-damaged", folder / "open_clip_config.json"):
        check_clip(str(folder))


class Reached(Exception):
    pass


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise `Reached` where weights would be downloaded, or a large model created."""

    def reached(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr("open_clip.create_model", reached)


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP2", "ViT-B-16-SigLIP2:webli"])
def test_planning_needs_no_tokenizer(name: str) -> None:
    with pytest.raises(Reached):
        blank_clip(name, CPU, without("transformers"))


# --- a CLIP like SigLIP, and one with a text model of transformers -------------------------------

WORDS = "a photo of the cat dog tree frog blurry low resolution good bad sculpture close up it ."


def write_tokenizer(folder: Path, bos: str | None, pad: str, eos: str, **config: Any) -> int:
    """Write one of whole words, with ids in the order pad, eos (or bos, pad, eos), others."""
    tokenizers = load("tokenizers")
    special = [*([bos] if bos else []), pad, eos, "<unk>"]
    words = {word: number for number, word in enumerate([*special, *WORDS.split()])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    single = f"{bos} $A {eos}" if bos else f"$A {eos}"
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[(each, words[each]) for each in special]
    )
    model.save(str(folder / "tokenizer.json"))
    names = {"pad_token": pad, "eos_token": eos, "unk_token": "<unk>", "bos_token": bos}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return len(words)


VISION = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}


def write_custom(folder: Path, text: dict[str, Any], preprocess: Any = None, **model: Any) -> Path:
    """Write an open_clip model with a text tower of its own, and random weights."""
    config = {"embed_dim": 24, "custom_text": True, "vision_cfg": VISION, "text_cfg": text, **model}
    torch.manual_seed(0)
    built = open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"})
    content = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_tensors(folder / "open_clip_model.safetensors", built.state_dict())
    return folder


SIGLIP = {
    "context_length": 16,
    "hf_tokenizer_name": "timm/of-no-repository",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "width": 16,
    "heads": 2,
    "layers": 2,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}


@pytest.fixture
def siglip(tmp_path: Path) -> Path:
    require("transformers")
    folder = tmp_path / "siglip"
    folder.mkdir()
    text = {**SIGLIP, "vocab_size": write_tokenizer(folder, None, "<pad>", "</s>")}
    half = [0.5, 0.5, 0.5]
    look = {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "squash"}
    return write_custom(folder, text, look, init_logit_bias=-10, init_logit_scale=2.5)


NAMES = ["cat", "Tree Frog", "DOG."]


def plain_embeddings(folder: Path, names: list[str], templates: list[str]) -> torch.Tensor:
    """Plain open_clip."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    texts = [template.replace("{}", name) for name in names for template in templates]
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    with torch.no_grad():
        encoded = model.eval().encode_text(tokens, normalize=True)
    return encoded.reshape(len(names), len(templates), -1)


@pytest.mark.usefixtures("no_network")
def test_a_directory_like_siglip_equals_plain_open_clip(siglip: Path) -> None:
    check_clip(str(siglip))
    clip, templates = load_clip(str(siglip), CPU), list(load_prompts("richkd"))
    ours = clip.text_embeddings(NAMES, templates)
    torch.testing.assert_close(ours, plain_embeddings(siglip, NAMES, templates))
    assert clip.logit_bias == -10 and clip.logit_scale == pytest.approx(np.exp(2.5))
    # lower case, without punctuation, ended and padded to the context length
    tokens = clip.tokenizer([fill("A photo, of a {}!", "CAT")])
    words = WORDS.split()
    ids = [3 + words.index(word) for word in ("a", "photo", "of", "a", "cat")]
    assert tokens.tolist() == [[*ids, 1, *[0] * 10]]
    with torch.no_grad():
        pixels = torch.randn(4, 3, 32, 32)
        logits = clip.model.get_logits(pixels, tokens)[0]
        cosines = clip.encode(pixels) @ F.normalize(clip.model.encode_text(tokens), dim=-1).T
    torch.testing.assert_close(logits, clip.logit_scale * cosines + clip.logit_bias)


def test_images_of_a_clip_like_siglip(siglip: Path, rng: np.random.Generator) -> None:
    """Squashed by PIL's bicubic filter to a square in −1..1, whatever the shape."""
    clip = load_clip(str(siglip), CPU)
    for height, width in ((32, 32), (64, 48), (40, 57), (20, 24)):
        coarse = rng.integers(64, 192, (2, 8, 8, 3), np.uint8)
        shape, bicubic = (width, height), Image.Resampling.BICUBIC
        images = [Image.fromarray(each).resize(shape, bicubic) for each in coarse]
        plain = np.stack([np.asarray(image.resize((32, 32), bicubic)) for image in images])
        expected = torch.from_numpy(plain).permute(0, 3, 1, 2) / 127.5 - 1
        arrays = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        assert (clip.preprocess(arrays) - expected).abs().max() <= 1.01 / 127.5
        files = torch.stack([clip.transform(image) for image in images])
        torch.testing.assert_close(files, expected, atol=1e-6, rtol=0)


ROBERTA = {
    "model_type": "xlm-roberta",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
MT5 = {
    "model_type": "mt5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def write_tower(folder: Path, config: dict[str, Any], bos: str | None) -> Path:
    """Write a CLIP whose text model is one of transformers, its config.json in the directory."""
    require("transformers")
    folder.mkdir()
    size = write_tokenizer(folder, bos, "<pad>", "</s>")
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
    text = {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": "of/no-repository",
        "hf_model_pretrained": False,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
        "context_length": 32,
    }
    write_custom(folder, text)
    return with_text(folder, hf_model_name="of/no-repository")  # as it was trained


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("config", "bos"), [(ROBERTA, "<s>"), (MT5, None)], ids=["xlm-roberta", "mt5"]
)
def test_a_text_model_of_transformers(tmp_path: Path, config: dict[str, Any], bos: str) -> None:
    """Its configuration is read from the directory, and it pays no attention to padding."""
    folder = write_tower(tmp_path / "clip", config, bos)
    check_clip(str(folder))
    clip = load_clip(str(folder), CPU)
    text = clip.model.text
    texts = ["a photo of the cat", "dog", "a blurry photo of a tree frog close up"]
    ours = clip.text_embeddings(texts, ["{}"])[:, 0]
    with torch.no_grad():
        for own, words in zip(ours, texts, strict=True):
            tokens = clip.tokenizer.tokenizer([words], return_tensors="pt").input_ids  # unpadded
            assert len(tokens[0]) == len(words.split()) + (2 if bos else 1)
            hidden = text.transformer(input_ids=tokens).last_hidden_state
            expected = F.normalize(text.proj(hidden.mean(1)), dim=-1)[0]
            torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)
    with_text(folder, hf_model_name=str(folder))
    torch.testing.assert_close(ours[:, None], plain_embeddings(folder, texts, ["{}"]))


def test_a_text_model_that_is_elsewhere(tmp_path: Path) -> None:
    folder = write_tower(tmp_path / "clip", ROBERTA, "<s>")
    (folder / "config.json").write_text('{"model_type": "clip"}')  # the whole CLIP's
    needed = "of/no-repository", "there is no network", "config.json", folder
    with refuses("clip-cannot-be-loaded", *needed):
        load_clip(str(folder), CPU, fault=lambda: "there is no network")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("known", ["Evil", "BertTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("form", [dict, list])
def test_code_of_a_tokenizer_is_refused(
    siglip: Path, tmp_path: Path, known: str, form: type
) -> None:
    """Also where transformers has a class of that name, which might give other tokens."""
    mark = tmp_path / "ran"
    (siglip / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    code = ["evil.Evil", "evil.Evil"]
    entry = {"AutoTokenizer": code} if form is dict else code
    write_tokenizer(siglip, None, "<pad>", "</s>", tokenizer_class=known, auto_map=entry)
    with_text(siglip, tokenizer_kwargs={"clean": "canonicalize", "trust_remote_code": True})
    with refuses("clip-tokenizer-code", siglip, "timm/of-no-repository"):
        load_clip(str(siglip), CPU)
    assert not mark.exists()


@pytest.mark.usefixtures("weights")
def test_code_of_a_text_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the hub, in its cache."""
    from huggingface_hub import constants

    repository, mark = tmp_path / "hub" / "models--of--code", tmp_path / "ran"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    code = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (repository / "snapshots" / "abc" / "config.json").write_text(json.dumps(code))
    (repository / "snapshots" / "abc" / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\nclass Evil: pass\n"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = with_text(write_tower(tmp_path / "clip", ROBERTA, "<s>"), hf_model_name="of/code")
    (folder / "config.json").unlink()
    with refuses("clip-tokenizer-code", folder, "text model of/code"):
        load_clip(str(folder), CPU, fault=lambda: "there is no network")
    assert not mark.exists()


@pytest.mark.usefixtures("weights")
def test_a_tokenizer_that_cannot_be_read_is_found_before_the_weights(siglip: Path) -> None:
    (siglip / "tokenizer_config.json").unlink()
    with refuses("clip-cannot-be-loaded", siglip, "tokenizer_config.json"):
        load_clip(str(siglip), CPU)
    (siglip / "tokenizer.json").write_text("{")
    with refuses("clip-cannot-be-loaded", siglip, "tokenizer.json", "timm/of-no-repository"):
        load_clip(str(siglip), CPU)


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("ViT-B-16-SigLIP2:webli", "tokenizer timm/ViT-B-16-SigLIP2"),
        ("xlm-roberta-base-ViT-B-32:laion5b_s13b_b90k", "text model xlm-roberta-base"),
        ("ViT-H-14-worldwide-quickgelu:metaclip2_worldwide", "tokenizer facebook/xlm-v-base"),
    ],
)
def test_a_tokenizer_that_is_not_in_the_cache_is_named_before_the_weights(
    name: str, repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("transformers")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    needed = name, repository, "there is no network", "--clip DIRECTORY", tmp_path / "hub"
    with refuses("clip-cannot-be-loaded", *needed):
        load_clip(name, CPU, fault=lambda: "there is no network")


def test_tokenizers_of_other_clips(siglip: Path, tmp_path: Path) -> None:
    def refused(*values: object) -> None:
        with refuses("clip-tokenizer-mismatch", *values):
            load_clip(str(siglip), CPU).text_embeddings(["cat"], ["a photo of a {}"])

    file = siglip / "tokenizer.json"
    was = file.read_text()
    words = json.loads(was)
    words["model"]["vocab"]["cat"] = 5000
    file.write_text(json.dumps(words))
    refused(siglip, 5000)
    file.write_text(was)
    with_text(siglip, pool_type="eos", eos_id=2)
    refused(siglip, "token 2")
    with_text(siglip, eos_id=1)
    load_clip(str(siglip), CPU).text_embeddings(["cat"], ["a photo of a {}"])
    other = write_tower(tmp_path / "tower", {**ROBERTA, "pad_token_id": 3}, "<s>")
    with refuses("clip-tokenizer-mismatch", other, "token 1", "with 3"):
        load_clip(str(other), CPU).text_embeddings(["cat"], ["{}"])


def test_sentencepiece_alone(tmp_path: Path) -> None:
    """As mT5's repository has it: a spiece.model, and no tokenizer.json."""
    require("transformers", "google.protobuf")
    pieces = load("sentencepiece")
    folder = tmp_path / "clip"
    folder.mkdir()
    with (folder / "spiece.model").open("wb") as file:
        pieces.SentencePieceTrainer.train(
            sentence_iterator=iter([WORDS] * 20),
            model_writer=file,
            vocab_size=30,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write_custom(folder, {**SIGLIP, "vocab_size": 30})
    check_clip(str(folder))
    clip = load_clip(str(folder), CPU)
    own = pieces.SentencePieceProcessor(model_file=str(folder / "spiece.model")).encode("the cat")
    assert clip.tokenizer(["The cat."])[0].tolist() == [*own, 1, *[0] * (15 - len(own))]
    ours, templates = clip.text_embeddings(NAMES, ["a {}"]), ["a {}"]
    torch.testing.assert_close(ours, plain_embeddings(folder, NAMES, templates))
