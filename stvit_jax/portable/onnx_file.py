"""A network as an ONNX model, for any number of pictures; jax2onnx converts, onnxruntime checks.

jax2onnx 0.13 takes a function that JAX has traced once and calls twice (of `custom_jvp` and
`checkpoint`) for one value with two makers. Inlined, each call has values of its own.
"""

import importlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from stvit_jax.errors import UserError, one_line

# Later ones would replace Orbax by one that is too old.
_INSTALL = "pip install 'jax2onnx<0.14' onnxruntime"
_INLINED = {"custom_jvp_call": "call_jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr"}


def dumps(
    function: Callable[[jax.Array], jax.Array], image_size: int, metadata: dict[str, Any]
) -> bytes:
    """The contents of a file; `metadata` in its `metadata_props`, as JSON.

    Args:
      function: of uint8 crops (B, S, S, 3).
      image_size: S.
      metadata: plain values.

    Raises:
      UserError: jax2onnx is missing, or cannot convert the function.
    """
    to_onnx = _package("jax2onnx").to_onnx
    # It warns of plugins for other packages, with tracebacks.
    for name in ("jax2onnx", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    (batch,) = jax.export.symbolic_shape("batch")
    crops = jax.ShapeDtypeStruct((batch, image_size, image_size, 3), np.uint8)
    names = dict(input_names=["images"], output_names=["logits"])
    try:
        model = to_onnx(_inlined(function), [crops], **names)
    except Exception as error:  # whatever a version of it and one of JAX make of each other
        raise UserError(f"jax2onnx cannot convert the network: {one_line(error)}") from error
    properties = {key: json.dumps(value) for key, value in metadata.items()}
    _package("onnx").helper.set_model_props(model, properties)
    return model.SerializeToString()


def loads(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """The function that a file of such contents holds, run by onnxruntime on a CPU."""
    runtime = _package("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f".onnx needs {name} ({one_line(error)}): {_INSTALL}") from error


def _inlined(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    def flat(images: jax.Array) -> jax.Array:
        crops = jax.ShapeDtypeStruct(images.shape, images.dtype)
        closed = jax.make_jaxpr(function)(crops)
        return next(_evaluate(closed.jaxpr, closed.consts, [images]))

    return flat


def _evaluate(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> Iterator[Any]:
    known = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def value(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        inputs = [value(atom) for atom in equation.invars]
        if inner := equation.params.get(_INLINED.get(equation.primitive.name)):
            results = _evaluate(
                getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs
            )
        else:
            results = equation.primitive.bind(*inputs, **equation.params)
            if not equation.primitive.multiple_results:
                results = [results]
        known.update(zip(equation.outvars, results, strict=True))
    return (value(atom) for atom in jaxpr.outvars)
