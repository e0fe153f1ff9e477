"""Modifiers: functions that build a ComfyUI workflow (a graph in API format) from a request's `modifications`.

A modifier's signature is its schema: names, types and defaults; a parameter without a default is required. A modifier
that needs something of the worker asks for it with the keyword-only argument `context`, which is no part of the schema.
A workflow exported from ComfyUI is a modifier without any code: its file goes into WORKFLOWS_DIR, and `fill` finds
the inputs that a request names. To add one in Python, write a function like those below:

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
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Protocol, Union, get_args, get_origin

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


def names(context: Context) -> list[str]:
    """The modifiers that there are: the functions, and the files in WORKFLOWS_DIR."""
    return sorted({*MODIFIERS, *_files(context)})


def build(name: str, modifications: dict[str, Any], context: Context) -> Graph:
    """The graph that the modifier of that name makes of the modifications; InvalidModification says what is wrong."""
    if function := MODIFIERS.get(name):
        given = {"context": context, "modifications": modifications}
        extra = {
            each: given[each]
            for each in given.keys() & inspect.signature(function).parameters.keys()
        }
        return function(
            **({} if "modifications" in extra else _arguments(function, modifications)), **extra
        )
    if path := _files(context).get(name):
        return fill(load(path), modifications)
    listed = names(context)
    raise InvalidModification(
        f"there is no modifier {name!r:.80}; there is: {', '.join(listed)}", modifiers=listed
    )


def _arguments(function: Callable[..., Graph], modifications: dict[str, Any]) -> dict[str, Any]:
    """The modifications as the function's signature wants them."""
    parameters = _parameters(function)
    required = {name for name, about in parameters.items() if "default" not in about}
    problems = [f"unknown {name!r}" for name in modifications if name not in parameters]
    problems += [
        f"{name} is missing" for name in parameters if name in required - modifications.keys()
    ]
    arguments = {}
    for name in [name for name in modifications if name in parameters]:
        try:
            arguments[name] = _convert(name, modifications[name], parameters[name]["type"])
        except InvalidModification as error:
            problems.append(str(error))
    if problems:
        message = (
            f"{'; '.join(problems[:10])}; there is: {', '.join(map(_describe, parameters.items()))}"
        )
        raise InvalidModification(f"{function.__name__}: {message}", schema=parameters)
    return arguments


def _parameters(function: Callable[..., Graph]) -> dict[str, dict[str, Any]]:
    """The schema: {name: {"type": ["integer", …], "default": …}}, without "default" where one is required."""
    schema: dict[str, dict[str, Any]] = {}
    for name, each in inspect.signature(function, eval_str=True).parameters.items():
        if each.kind is each.VAR_KEYWORD:  # stands for Text2Image's other parameters
            schema = {**schema, **_parameters(Text2Image), **schema}
        if each.kind in (each.KEYWORD_ONLY, each.VAR_KEYWORD):
            continue
        kinds = (
            get_args(each.annotation)
            if get_origin(each.annotation) in (Union, UnionType)
            else (each.annotation,)
        )
        if not set(kinds) <= TYPE_NAMES.keys():
            raise ValueError(
                f"{function.__name__}: {name} needs a type: str, int, float, bool, or a union of them"
            )
        schema[name] = {"type": [TYPE_NAMES[kind] for kind in kinds]}
        if each.default is not each.empty:
            _convert(
                f"{function.__name__}: the default of {name}", each.default, schema[name]["type"]
            )
            schema[name]["default"] = each.default
    return schema


def _describe(parameter: tuple[str, dict[str, Any]]) -> str:
    name, about = parameter
    return f"{name} ({' or '.join(about['type'])}, {'required' if 'default' not in about else 'optional'})"


def _convert(name: str, value: Any, kinds: list[str]) -> Any:
    """The value as one of these types; JSON knows one kind of number: 20 is a fine float, and 20.0 a fine integer."""
    if "integer" in kinds and isinstance(value, float) and value.is_integer():
        value = int(value)
    kind = TYPE_NAMES.get(type(value), "")
    if kind not in kinds and not (kind == "integer" and "number" in kinds):
        raise InvalidModification(f"{name} has to be {' or '.join(kinds)}, not {value!r:.60}")
    return value


# Workflows in files ###################################################################################################


def _files(context: Context) -> dict[str, Path]:
    """The workflows in WORKFLOWS_DIR by name. Only what is listed there is ever opened: no name leads out of it."""
    folder = context.settings.workflows_dir
    return {path.stem: path for path in Path(folder).glob("*.json")} if folder else {}


def load(path: Path) -> Graph:
    """The graph in the file, in API format; InvalidModification says by the file's name what is wrong with it."""
    try:
        graph: Graph = json.loads(
            path.read_text("utf-8-sig"), parse_constant=int
        )  # int refuses NaN
    except (OSError, ValueError, RecursionError) as error:
        fault = (
            f"cannot be read: {error.strerror}"
            if isinstance(error, OSError)
            else f"is not JSON: {error}"
        )
    else:
        fault = _fault(graph)
    if fault:
        raise InvalidModification(f"the workflow file {path.name} {fault}")
    return graph


def _fault(graph: Any) -> str:
    """Why it is no graph in API format; empty where it is one."""
    if not isinstance(graph, dict) or not graph:
        return "is not in API format: it has to be an object of nodes"
    if isinstance(graph.get("nodes"), list):
        return "is in the editor's own format; in ComfyUI, use Workflow > Export (API)"
    for node_id, node in graph.items():
        kinds = [
            type(node[each])
            for each in ("class_type", "inputs")
            if isinstance(node, dict) and each in node
        ]
        if kinds != [str, dict]:
            return f"is not in API format: node {node_id!r} needs a class_type (a string) and inputs (an object)"
    return ""


# Filling a graph ######################################################################################################

Target = tuple[
    str, ...
]  # a node's id and the name of one of its inputs; or a placeholder's name alone

PROMPTS = {"prompt": "positive", "negative_prompt": "negative"}
PLACEHOLDER = re.compile(r"\{\{ *([\w.:-]+) *\}\}")
# A graph does not have the types of its inputs, so what they are for is told by their names.
CONDITIONING = re.compile(
    r"cond(?!2)|positive|negative|guider|any_|input\d|on_"
)  # from any_ on: of switches
TEXT = re.compile(r"text|prompt|string|value|^tags|positive|negative")
NO_TEXT = re.compile(
    r"system|padding|encoder|template|type|mode|^clip$"
)  # other inputs of text encoders
LATENT = re.compile(r"samples|latent|pixels|^image")


def fill(graph: Graph, modifications: dict[str, Any]) -> Graph:
    """The graph with the modifications in it; InvalidModification lists what can be set (`settable` in its details)."""
    known = {name for _, value in _inputs(graph) for name in _placeholders(value)}
    values: dict[Target, Any] = {}
    problems = []
    for name, value in modifications.items():
        try:
            targets = [(name.casefold(),)] if name.casefold() in known else _targets(graph, name)
            converted = {target: _convert(name, value, _kinds(graph, target)) for target in targets}
            if any(values.get(target, each) != each for target, each in converted.items()):
                raise InvalidModification(
                    f"{name} sets an input that another modification sets as well"
                )
            values |= converted
        except InvalidModification as error:
            problems.append(str(error))
            if len(problems) == 10:
                break
    left = {target: value for target, value in _inputs(graph) if target not in values}
    asked = {name for value in left.values() for name in _placeholders(value)}
    given = {target[0] for target in values if not target[1:]}
    problems += [
        f"{name} is missing, which the workflow has a placeholder for"
        for name in sorted(asked - given)
    ]
    problems += [
        f"{name} fills a text that another modification replaces" for name in sorted(given - asked)
    ]
    problems += [
        f"{'.'.join(target)} is not below steps: name both" for target in _skipped(graph, values)
    ]
    if problems:
        _refuse(
            graph,
            sorted(known | {name for name, role in PROMPTS.items() if _texts(graph, role)}),
            problems,
        )
    values |= {target: _replace(value, values) for target, value in left.items()}
    return {
        key: {**graph[key], "inputs": {name: values[key, name] for name in graph[key]["inputs"]}}
        for key in graph
    }


def _skipped(graph: Graph, values: dict[Target, Any]) -> list[Target]:
    """Where samplers share their steps: the starts of those that would be left nothing to do by new steps."""
    now = {**dict(_inputs(graph)), **values}
    starts = {target: (target[0], "start_at_step") for target in values if target[1:] == ("steps",)}
    return [
        each
        for steps, each in starts.items()
        if isinstance(now.get(each), int) and 0 < now[each] >= now[steps]
    ]


def _kinds(graph: Graph, target: Target) -> list[str]:
    """The types that may replace what the input holds; ComfyUI exports a float of 1.0 as 1."""
    present = _value(graph, target) if target[1:] else "{{}}"
    if isinstance(present, str) and "{{" in present:
        return ["string", "number", "boolean"]
    if not isinstance(present, (str, int, float)):
        raise InvalidModification(
            f"{'.'.join(target)} is linked to another node, or holds no single value"
        )
    kind = "integer" if present == RANDOM_INT else TYPE_NAMES[type(present)]
    return ["integer", "number"] if kind == "integer" else [kind]


def _refuse(graph: Graph, names: list[str], problems: list[str]) -> NoReturn:
    targets = [target for target, value in _inputs(graph) if isinstance(value, (str, int, float))]
    settable = [{"name": name} for name in names] + [_about(graph, target) for target in targets]
    takes = ", ".join([*names, *(_shown(graph, target) for target in targets)][:40])
    raise InvalidModification(
        f"{'; '.join(problems[:10])}; what can be set: {takes}", settable=settable
    )


def _refuse_unlike(
    graph: Graph, name: str, targets: list[Target], is_unclear: bool = False
) -> None:
    """Refuses a name for several inputs that hold different values: it may be meant for one of them."""
    if is_unclear or any(_value(graph, target) != _value(graph, targets[0]) for target in targets):
        choices = ", ".join(_shown(graph, target) for target in targets)
        raise InvalidModification(f"{name} may mean several inputs, choose among {choices}")


def _about(graph: Graph, target: Target) -> dict[str, Any]:
    value = _value(graph, target)
    short = value[:60] + "…" if isinstance(value, str) and len(value) > 60 else value
    return {"name": ".".join(target), "class_type": graph[target[0]]["class_type"], "value": short}


def _shown(graph: Graph, target: Target) -> str:
    return "{name} ({class_type}: {value!r})".format_map(_about(graph, target))


def _inputs(graph: Graph) -> Iterator[tuple[Target, Any]]:
    return (
        ((node_id, name), value)
        for node_id, node in graph.items()
        for name, value in node["inputs"].items()
    )


def _value(graph: Graph, target: Target) -> Any:
    return graph[target[0]]["inputs"].get(target[1])


def _placeholders(value: Any) -> list[str]:
    return [name.casefold() for name in PLACEHOLDER.findall(json.dumps(value, ensure_ascii=False))]


def _replace(value: Any, values: dict[Target, Any]) -> Any:
    """The value with its placeholders filled: a whole string becomes what it stands for, else it is put in as text."""
    if isinstance(value, dict):
        return {name: _replace(each, values) for name, each in value.items()}
    if isinstance(value, list):
        return [_replace(each, values) for each in value]
    if isinstance(value, str) and (whole := PLACEHOLDER.fullmatch(value)):
        return values[(whole[1].casefold(),)]
    return (
        PLACEHOLDER.sub(lambda found: str(_replace(found[0], values)), value)
        if isinstance(value, str)
        else value
    )


def _targets(graph: Graph, name: str) -> list[Target]:
    """The inputs that a name means: "NODE_ID.input" (an id may have dots in it) or a bare name."""
    node_id, _, each = name.rpartition(".")
    if node_id in graph and each in graph[node_id]["inputs"]:
        return [(node_id, each)]
    find = {"prompt": _prompt, "negative_prompt": _prompt, "width": _size, "height": _size}.get(
        name
    )
    if find and (found := find(graph, name)):
        return found
    names = ("seed", "noise_seed") if name == "seed" else (name,)
    found = _literals(graph, [(node_id, each) for node_id in graph for each in names])
    if not found:
        why = ": no text feeds the samplers' negative alone" if name == "negative_prompt" else ""
        raise InvalidModification(f"{name!r:.80} fits nothing in the workflow{why}")
    if name != "seed":  # one is as good as another, but other values that differ do so for a reason
        is_both = all({*found} & {*_texts(graph, role)} for role in PROMPTS.values())
        _refuse_unlike(graph, name, found, is_both)
    return found


def _literals(graph: Graph, targets: list[Target]) -> list[Target]:
    """Those of the inputs that hold a value, and for those linked to a node that is nothing but a number, that one."""
    kinds = dict.fromkeys(targets, (str, int, float))
    reached = _reached(
        graph, targets, lambda id: [*graph[id]["inputs"]] if len(graph[id]["inputs"]) == 1 else []
    )
    found = {target: _value(graph, target) for target in reached}
    return [
        target
        for target, value in found.items()
        if isinstance(value, kinds.get(target, (int, float)))
    ]


def _prompt(graph: Graph, name: str) -> list[Target]:
    """The texts that feed the samplers. A text encoder's several inputs may differ, for they are the same prompt's."""
    found = _texts(graph, PROMPTS[name])
    nodes = {target[:1] if _linked(graph, (target[0], "clip")) else target for target in found}
    _refuse_unlike(graph, name, found if len(nodes) > 1 else [])
    return found


def _texts(graph: Graph, role: str) -> list[Target]:
    """The strings that the samplers' positive or negative is made of; a negative made of the prompt has none."""

    def step(source: str) -> list[str]:
        inputs = graph[source]["inputs"]
        links = [
            each for each in inputs if CONDITIONING.match(each) and _linked(graph, (source, each))
        ]
        texts = [each for each in inputs if not NO_TEXT.search(each)]
        telling = [each for each in texts if TEXT.search(each)]
        # An encoder whose inputs have no telling names is known by its clip.
        texts = telling or (texts if _linked(graph, (source, "clip")) else [])
        return _of_role(links, role) + _of_role(texts, role)

    starts = [target for target, _ in _inputs(graph) if target[1] in (role, "guider")]
    prompt = _texts(graph, "positive") if role == "negative" else []
    found = _reached(graph, starts, step)
    return [
        target
        for target in found
        if isinstance(_value(graph, target), str) and target not in prompt
    ]


def _of_role(names: list[str], role: str) -> list[str]:
    """The names that have the role in them if there are any, else those that do not have the other."""
    other = "negative" if role == "positive" else "positive"
    return [name for name in names if role in name] or [name for name in names if other not in name]


def _size(graph: Graph, name: str) -> list[Target]:
    """The width or height of the samplers' latents, and where else it is the same; none without such a latent."""

    def step(source: str) -> list[str]:
        inputs = graph[source]["inputs"]
        return [name] if name in inputs else [each for each in inputs if LATENT.search(each)]

    reached = _reached(
        graph, [target for target, _ in _inputs(graph) if target[1] == "latent_image"], step
    )
    found = _literals(graph, [target for target in reached if target[1] == name])
    _refuse_unlike(graph, name, found)
    # What a text encoder calls its width is the size of the pictures that the model was trained on.
    others: list[Target] = [
        (node_id, name) for node_id in graph if not _linked(graph, (node_id, "clip"))
    ]
    alike = _literals(graph, found and found + others)
    return [target for target in alike if _value(graph, target) == _value(graph, found[0])]


def _reached(graph: Graph, starts: list[Target], step: Callable[[str], list[str]]) -> list[Target]:
    """The inputs and all that they are linked to: `step` says by which inputs to go on from a node."""
    found: dict[Target, None] = {}
    ahead = [*starts]
    for target in ahead:  # it grows meanwhile
        if target not in found:
            found[target] = None
            ahead += [(source, name) for source in _linked(graph, target) for name in step(source)]
    return list(found)


def _linked(graph: Graph, target: Target) -> list[str]:
    """The node that an input is linked to, if it is."""
    value = _value(graph, target)
    is_link = (
        isinstance(value, list)
        and [type(each) for each in value] == [str, int]
        and value[0] in graph
    )
    return value[:1] if is_link else []


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
    numbers = {
        "seed": RANDOM_INT if seed is None else seed,
        "cfg": cfg if cfg_scale is None else cfg_scale,
    }
    sampling = {
        "steps": steps,
        "sampler_name": sampler_name,
        "scheduler": scheduler,
        "denoise": denoise,
    }
    links = {
        "model": ["4", 0],
        "positive": ["6", 0],
        "negative": ["7", 0],
        "latent_image": ["5", 0],
    }
    return {
        "3": {"class_type": "KSampler", "inputs": {**numbers, **sampling, **links}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "5": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": width, "height": height, "batch_size": batch_size},
        },
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": prompt, "clip": ["4", 1]}},
        "7": {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": negative_prompt, "clip": ["4", 1]},
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {
            "class_type": "SaveImage",
            "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]},
        },
    }


@modifier
def Image2Image(
    input_image: str,
    prompt: str,
    width: int | None = None,
    height: int | None = None,
    denoise: float = 0.75,
    batch_size: int = 1,
    *,
    context: Context,
    **others: Any,
) -> Graph:
    """Text2Image, begun with a picture (a name in ComfyUI's input folder, a URL or a data URI) that keeps its size."""
    graph = Text2Image(prompt, denoise=denoise, context=context, **others)
    graph["10"] = {"class_type": "LoadImage", "inputs": {"image": input_image}}
    graph["5"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["10", 0], "vae": ["4", 2]}}
    if (
        width is not None or height is not None
    ):  # ImageScale makes of a 0 what keeps the proportions
        size = {
            "width": width or 0,
            "height": height or 0,
            "upscale_method": "lanczos",
            "crop": "center",
        }
        graph["11"] = {"class_type": "ImageScale", "inputs": {"image": ["10", 0], **size}}
        graph["5"]["inputs"]["pixels"] = ["11", 0]
    if batch_size != 1:
        graph["12"] = {
            "class_type": "RepeatLatentBatch",
            "inputs": {"samples": ["5", 0], "amount": batch_size},
        }
        graph["3"]["inputs"]["latent_image"] = ["12", 0]
    return graph


@modifier
def RawWorkflow(*, modifications: dict[str, Any], context: Context) -> Graph:
    """The workflow in WORKFLOW_FILE, else Text2Image's, with whatever it has inputs for."""
    file = context.settings.workflow_file
    return fill(load(Path(file)) if file else Text2Image("", context=context), modifications)


def _default_checkpoint(context: Context) -> str:
    """DEFAULT_CHECKPOINT, else the first checkpoint that ComfyUI lists."""
    chosen = context.settings.default_checkpoint
    installed = [chosen] if chosen else context.choices("CheckpointLoaderSimple", "ckpt_name")
    if not installed:
        raise InvalidModification(
            "ComfyUI has no checkpoint: put a .safetensors file into its models/checkpoints"
        )
    return installed[0]
