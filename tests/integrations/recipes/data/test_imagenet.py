"""ImageNet's folders: WordNet ids or numbers, all classes or some, names and templates of CLIP."""

import re

import numpy as np
import pytest
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from samples import damage, to_tensor, tokenize, untokenize, write_image
from timm.data import ImageNetInfo

from geomreg.integrations.recipes.data import ImageNet
from geomreg.integrations.recipes.data.imagenet import IMAGENET_TEMPLATES

KNOWN = {  # folder: number in ILSVRC2012's sorted synsets, name; as in keras' imagenet_class_index.json
    "n01440764": (0, "tench"),
    "n01443537": (1, "goldfish"),
    "n02012849": (134, "crane bird"),
    "n03126707": (517, "construction crane"),
    "n03710637": (638, "tights"),
    "n03710721": (639, "one-piece bathing suit"),
    "n15075141": (999, "toilet paper"),
}


def read(folder, **more):
    return ImageNet(folder, **{"transform": to_tensor, "tokenizer": lambda texts: tokenize([t[-12:] for t in texts])} | more)


def test_wordnet_ids_of_any_subset(tmp_path):
    folders = ["n15075141", "n01440764", "n03126707"]
    for k, folder in enumerate(folders):
        write_image(tmp_path / folder / f"{folder}_{k}.JPEG", (k, 0, 0))
    data = read(tmp_path)
    assert data.classes == ("tench", "construction crane", "toilet paper")
    assert data.labels.tolist() == [0, 1, 2]
    assert list(data.ids) == ["n01440764/n01440764_1.JPEG", "n03126707/n03126707_2.JPEG", "n15075141/n15075141_0.JPEG"]
    assert data.class_texts("a {}!") == ["a tench!", "a construction crane!", "a toilet paper!"]
    assert untokenize(data[2]["text"]) == IMAGENET_TEMPLATES[2].replace("{}", "toilet paper")[-12:]


@pytest.mark.parametrize("pattern", ["{}", "{:04d}", "{:03d}"])
def test_numbers(tmp_path, pattern):
    for number, _ in KNOWN.values():
        write_image(tmp_path / pattern.format(number) / "x.jpeg")
    data = read(tmp_path)
    names = {pattern.format(number): name for number, name in KNOWN.values()}
    assert data.classes == tuple(names[folder] for folder in sorted(names))
    assert data.labels.tolist() == list(range(len(names)))


def test_known_classes(tmp_path):
    for folder in KNOWN:
        write_image(tmp_path / folder / "x.jpeg")
    assert read(tmp_path).classes == tuple(name for _, name in KNOWN.values())


def test_lists_that_the_reader_relies_on():
    synsets = ImageNetInfo().label_names()
    assert synsets == sorted(set(synsets))
    assert len(synsets) == len(IMAGENET_CLASSNAMES) == 1000
    for folder, (number, name) in KNOWN.items():
        assert (synsets[number], IMAGENET_CLASSNAMES[number]) == (folder, name)
    names, counts = np.unique(IMAGENET_CLASSNAMES, return_counts=True)
    assert names[counts > 1].tolist() == ["missile", "sunglasses"]  # as documented
    assert [IMAGENET_CLASSNAMES[number] for number in (657, 744, 836, 837)] == ["missile"] * 2 + ["sunglasses"] * 2


def test_templates(tmp_path):
    write_image(tmp_path / "n01440764" / "x.jpeg")
    data = read(tmp_path)
    assert len(data.templates) == len(set(data.templates)) == 80
    assert data.templates[0] == "a bad photo of a {}."
    assert data.templates[-1] == "a tattoo of the {}."
    assert all(template.count("{}") == 1 for template in data.templates)
    assert read(tmp_path, templates=("{}!",)).templates == ("{}!",)
    with pytest.raises(ValueError, match=r"^ImageNet: expected templates as"):
        read(tmp_path, templates=("x",))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["n01440764", "n01440765"], "got 'n01440765'. Did you mean n01440764?"),
        (["train", "val"], "got 'train'. Pass the folder that holds the class folders"),
        (["1000"], "by WordNet id (n01440764) or number (0 to 999) in "),
        (["-1"], "got '-1'."),
        (["٣"], "got '٣'."),
        (["7", "0007"], "got 0007 and 7. Merge or remove one."),
        (["n01440764", "0"], "got 0 and n01440764. Merge or remove one."),
    ],
)
def test_unknown_folders(tmp_path, folders, message):
    for folder in folders:
        write_image(tmp_path / folder / "x.jpeg")
    with pytest.raises(ValueError, match=r"^ImageNet: expected .*" + re.escape(message)):
        read(tmp_path)


def test_other_mistakes_carry_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^ImageNet: expected a folder of class folders, got none at"):
        read(tmp_path / "absent")
    write_image(tmp_path / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(FileNotFoundError, match=r"^ImageNet: expected a folder for each class in .*, got none"):
        read(tmp_path)
    (tmp_path / "n01440764").mkdir()
    with pytest.raises(FileNotFoundError, match=r"^ImageNet: expected images"):
        read(tmp_path)
    write_image(tmp_path / "n01440764" / "x.jpeg")
    (tmp_path / "n01443537").mkdir()
    with pytest.raises(ValueError, match=r"^ImageNet: expected images in every class folder of .*, got none in n01443537"):
        read(tmp_path)
    write_image(tmp_path / "n01443537" / "x.jpeg")
    damage(tmp_path / "n01443537" / "x.jpeg", "empty")
    assert read(tmp_path)[1]["broken"].endswith("x.jpeg: empty file")
    with pytest.raises(ValueError, match=r"^ImageNet: expected an image, got"):
        read(tmp_path, strict=True)[1]
