"""Modifiers: functions that build a ComfyUI workflow (a graph in API format) from a request's `modifications`.

A modifier's signature is its schema: names, types and defaults; a parameter without a default is required. A modifier
that needs something of the worker asks for it with the keyword-only argument `context`, which is no part of the schema.
To add one, write a function like those below:

    @modifier
    def Inverted(image: str) -> Graph:
        return {
            "1": {"class_type": "LoadImage", "inputs": {"image": image}},
            "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
            "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "inverted"}},
        }
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Protocol

Graph = dict[str, dict[str, Any]]  # node id -> {"class_type": …, "inputs": {…}}

RANDOM_INT = "__RANDOM_INT__"  # the worker puts a fresh integer in its place


class Context(Protocol):
    """What a modifier may ask of the worker."""

    settings: Any
    """The worker's environment variables, by their names in lower case: settings.default_checkpoint"""

    def choices(self, class_type: str, name: str) -> list[str]:
        """What ComfyUI offers for an input of a node: choices("LoraLoader", "lora_name")"""


class InvalidModification(ValueError):
    """What a request asked for cannot be built; its message goes to the client, `details` into the answer's `error`."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details


# The machinery ########################################################################################################

MODIFIERS: dict[str, Callable[..., Graph]] = {}
TYPE_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def modifier(function: Callable[..., Graph]) -> Callable[..., Graph]:
    """Makes the function a modifier under its own name; what makes no schema, or hides another, stops the worker."""
    if function.__name__ in MODIFIERS:
        raise ValueError(f"there are two modifiers of the name {function.__name__}")
    _parameters(function)
    MODIFIERS[function.__name__] = function
    return function


def build(name: str, modifications: dict[str, Any], context: Context) -> Graph:
    """The graph that the modifier of that name makes of the modifications; InvalidModification says what is wrong."""
    function = MODIFIERS.get(name)
    if not function:
        listed = sorted(MODIFIERS)
        raise InvalidModification(f"there is no modifier {name!r}; there is: {', '.join(listed)}", modifiers=listed)
    parameters = _parameters(function)
    problems = [f"unknown {each!r}" for each in modifications if each not in parameters]
    problems += [
        f"{each} is missing"
        for each, about in parameters.items()
        if each not in modifications and "default" not in about
    ]
    problems += [
        f"{each} has to be {' or '.join(parameters[each]['type'])}, not {value!r:.60}"
        for each, value in modifications.items()
        if each in parameters and not _fits(value, parameters[each]["type"])
    ]
    if problems:
        message = f"{name}: {'; '.join(problems[:10])}; there is: {', '.join(map(_describe, parameters.items()))}"
        raise InvalidModification(message, schema=parameters)
    extra = {"context": context} if "context" in inspect.signature(function).parameters else {}
    return function(
        **{each: _convert(value, parameters[each]["type"]) for each, value in modifications.items()}, **extra
    )


def _parameters(function: Callable[..., Graph]) -> dict[str, dict[str, Any]]:
    """The schema: {name: {"type": ["integer", …], "default": …}}, without "default" where one is required."""
    schema: dict[str, dict[str, Any]] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            continue
        union = typing.get_origin(parameter.annotation) in (typing.Union, types.UnionType)
        kinds = typing.get_args(parameter.annotation) if union else (parameter.annotation,)
        if not set(kinds) <= TYPE_NAMES.keys():
            raise ValueError(f"{function.__name__}: {name} needs a type: str, int, float, bool, or a union of them")
        schema[name] = {"type": [TYPE_NAMES[kind] for kind in kinds]}
        if parameter.default is not parameter.empty:
            schema[name]["default"] = parameter.default
            if not _fits(parameter.default, schema[name]["type"]):
                raise ValueError(f"{function.__name__}: the default of {name} is not of its type")
    return schema


def _describe(parameter: tuple[str, dict[str, Any]]) -> str:
    name, about = parameter
    kind = " or ".join(each for each in about["type"] if each != "null")
    return f"{name} ({kind}, {'required' if 'default' not in about else 'optional'})"


def _fits(value: Any, kinds: list[str]) -> bool:
    kind = TYPE_NAMES.get(type(value), "")
    # JSON knows one kind of number: 20 is a fine float, and 20.0 a fine integer
    return kind in kinds or (kind == "integer" and "number" in kinds) or _is_whole(value, kinds)


def _is_whole(value: Any, kinds: list[str]) -> bool:
    return "integer" in kinds and isinstance(value, float) and value.is_integer()


def _convert(value: Any, kinds: list[str]) -> Any:
    return int(value) if _is_whole(value, kinds) and "number" not in kinds else value


# The modifiers ########################################################################################################


@modifier
def Text2Image(
    prompt: str,
    negative_prompt: str = "",
    width: int = 512,
    height: int = 512,
    steps: int = 20,
    seed: int | None = None,
    cfg: float = 7.0,
    cfg_scale: float | None = None,
    sampler_name: str = "euler",
    scheduler: str = "normal",
    denoise: float = 1.0,
    ckpt_name: str | None = None,
    batch_size: int = 1,
    *,
    context: Context,
) -> Graph:
    """A picture after a text, with a Stable Diffusion checkpoint; without a seed a random one, `cfg_scale` is `cfg`."""
    checkpoint = _default_checkpoint(context) if ckpt_name is None else ckpt_name
    return {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": RANDOM_INT if seed is None else seed,
                "steps": steps,
                "cfg": cfg if cfg_scale is None else cfg_scale,
                "sampler_name": sampler_name,
                "scheduler": scheduler,
                "denoise": denoise,
                "model": ["4", 0],
                "positive": ["6", 0],
                "negative": ["7", 0],
                "latent_image": ["5", 0],
            },
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": width, "height": height, "batch_size": batch_size}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": prompt, "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": negative_prompt, "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    }


@modifier
def RawWorkflow(
    prompt: str = "",
    width: int = 512,
    height: int = 512,
    steps: int = 20,
    seed: int | None = None,
    *,
    context: Context,
) -> Graph:
    """The worker's own workflow, which is Text2Image's, with the values that every picture has."""
    return Text2Image(prompt, width=width, height=height, steps=steps, seed=seed, context=context)


def _default_checkpoint(context: Context) -> str:
    """DEFAULT_CHECKPOINT, else the first checkpoint that ComfyUI lists."""
    chosen: str = context.settings.default_checkpoint
    if chosen:
        return chosen
    installed = context.choices("CheckpointLoaderSimple", "ckpt_name")
    if not installed:
        raise InvalidModification(
            "ComfyUI has no checkpoint: put one (a .safetensors file) into its folder models/checkpoints"
        )
    return installed[0]
