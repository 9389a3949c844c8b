"""The names of ImageNet's classes: in tfds's order, each another, and whose they are."""

import re
from importlib import resources

from stvit_jax.data.imagenet_names import display_names, imagenet_names


def test_the_order_is_that_of_the_labels_of_tfds() -> None:
    labels = resources.files("tensorflow_datasets") / "datasets/imagenet2012/labels.txt"
    assert list(imagenet_names()) == labels.read_text().split()


def test_a_line_is_a_synset_and_a_name_that_no_other_class_has() -> None:
    text = (resources.files("stvit_jax.data") / "imagenet_names.txt").read_text("utf-8")
    lines = text.splitlines()
    assert len(lines) == 1000 and text.endswith("\n")
    assert all(re.fullmatch(r"n\d{8}\t\S.*\S", line) for line in lines)
    assert len(set(imagenet_names().values())) == 1000


def test_some_that_everybody_knows() -> None:
    names = list(imagenet_names().values())
    assert names[0] == "tench, Tinca tinca"
    assert names[134] == "crane (bird)" and names[517] == "crane (machine)"
    assert names[638] == "maillot (tights)" and names[639] == "maillot, tank suit"
    assert names[999].startswith("toilet tissue")


def test_names_of_the_classes_of_a_network() -> None:
    english = tuple(imagenet_names().values())
    assert display_names(tuple(imagenet_names()), 1000) == english
    assert display_names(None, 1000) == english
    assert display_names(("n01443537", "n02012849"), 2) == (
        "goldfish, Carassius auratus",
        "crane (bird)",
    )
    assert display_names(("cat", "n9"), 2) == ("cat", "n9")
    assert display_names(None, 3) == ("class 0", "class 1", "class 2")
