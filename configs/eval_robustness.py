"""A trained ImageNet model on ReaL labels, ImageNet-V2, -A, -R and -Sketch.

    python train.py --config configs/eval_robustness.py --workdir runs/robustness \
        --config.init_from=WEIGHTS --config.model.name=stvit_base

WEIGHTS as for any evaluation; `:384` after the config's name for models fine-tuned at 384. Prepare
the sets once: the command says how, set after set. Fewer sets:
`--config.robustness="('imagenet_a', 'imagenet_r')"`. What is counted is said in
stvit_jax/tasks/robustness.py.

| model | ReaL | V2 | A | R | Sketch | hardware | time |
| --- | --- | --- | --- | --- | --- | --- | --- |
| - | - | - | - | - | - | - | - |
"""

from ml_collections import ConfigDict

from stvit_jax.recipes import imagenet


def get_config(arg: str = "") -> ConfigDict:
    config = imagenet(arg)
    config.eval_only = True
    config.robustness = (
        "imagenet2012_real",
        "imagenet_v2",
        "imagenet_a",
        "imagenet_r",
        "imagenet_sketch",
    )
    config.lock()
    return config
