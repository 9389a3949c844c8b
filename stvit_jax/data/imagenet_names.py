"""English names of ImageNet's thousand classes, and of the classes of a network.

`imagenet_names.txt` has a line a class, in the order of the labels: the WordNet synset, a tab, its
lemmas. They are those of WordNet 3.0, as the package timm 1.0.31 (Apache-2.0) lists them in
`timm/data/_info`. WordNet's notice, which every copy carries, lies beside them in
`imagenet_names.LICENSE` (https://wordnet.princeton.edu/license-and-commercial-use). Three names
were changed to tell classes apart: the two cranes, and the maillot that is no swimsuit.
"""

import functools
from collections.abc import Sequence
from importlib import resources

CLASSES = 1000


@functools.cache
def imagenet_names() -> dict[str, str]:
    """Names by synset (`n01440764`), in the order of the labels."""
    text = (resources.files("stvit_jax.data") / "imagenet_names.txt").read_text("utf-8")
    return dict(line.split("\t") for line in text.splitlines())


def display_names(classes: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """What a person is told of a label.

    Args:
      classes: names by label, as weights carry them; None where they carry none.
      count: outputs of the network.

    Returns:
      A name for each output. Synsets of ImageNet are translated, other names kept. Without any, a
      thousand outputs are taken for ImageNet's, and others numbered.
    """
    english = imagenet_names()
    if classes is not None:
        return tuple(english.get(name, name) for name in classes)
    if count == CLASSES:
        return tuple(english.values())
    return tuple(f"class {label}" for label in range(count))
