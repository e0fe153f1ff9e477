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
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

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
SCALAR = ["string", "number", "boolean"]


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
    function = MODIFIERS.get(name)
    if function:
        given = {"context": context, "modifications": modifications}
        extra = {each: given[each] for each in given.keys() & inspect.signature(function).parameters.keys()}
        return function(**({} if "modifications" in extra else _arguments(function, modifications)), **extra)
    if path := _files(context).get(name):
        return fill(load(path), modifications)
    listed = names(context)
    raise InvalidModification(f"there is no modifier {name!r}; there is: {', '.join(listed)}", modifiers=listed)


def _arguments(function: Callable[..., Graph], modifications: dict[str, Any]) -> dict[str, Any]:
    """The modifications as the function's signature wants them."""
    parameters = _parameters(function)
    required = {name for name, about in parameters.items() if "default" not in about}
    problems = [f"unknown {name!r}" for name in modifications if name not in parameters]
    problems += [f"{name} is missing" for name in parameters if name in required - modifications.keys()]
    arguments = {}
    for name in [name for name in modifications if name in parameters]:
        try:
            arguments[name] = _convert(name, modifications[name], parameters[name]["type"])
        except InvalidModification as error:
            problems.append(str(error))
    if problems:
        there_is = ", ".join(map(_describe, parameters.items()))
        message = f"{function.__name__}: {'; '.join(problems[:10])}; there is: {there_is}"
        raise InvalidModification(message, schema=parameters)
    return arguments


def _parameters(function: Callable[..., Graph]) -> dict[str, dict[str, Any]]:
    """The schema: {name: {"type": ["integer", …], "default": …}}, without "default" where one is required."""
    schema: dict[str, dict[str, Any]] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:  # stands for Text2Image's other parameters
            schema = {
                **schema,
                **{each: about for each, about in _parameters(Text2Image).items() if each not in schema},
            }
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
            continue
        union = typing.get_origin(parameter.annotation) in (typing.Union, types.UnionType)
        kinds = typing.get_args(parameter.annotation) if union else (parameter.annotation,)
        if not set(kinds) <= TYPE_NAMES.keys():
            raise ValueError(f"{function.__name__}: {name} needs a type: str, int, float, bool, or a union of them")
        schema[name] = {"type": [TYPE_NAMES[kind] for kind in kinds]}
        if parameter.default is not parameter.empty:
            _convert(f"{function.__name__}: the default of {name}", parameter.default, schema[name]["type"])
            schema[name]["default"] = parameter.default
    return schema


def _describe(parameter: tuple[str, dict[str, Any]]) -> str:
    name, about = parameter
    kind = " or ".join(each for each in about["type"] if each != "null")
    return f"{name} ({kind}, {'required' if 'default' not in about else 'optional'})"


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
        graph: Graph = json.loads(path.read_text("utf-8-sig"))
        fault = _fault(graph)
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        fault = f"is not JSON: {error}"
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
        kinds = [type(node[each]) for each in ("class_type", "inputs") if isinstance(node, dict) and each in node]
        if kinds != [str, dict]:
            return f"is not in API format: node {node_id!r} needs a class_type (a string) and inputs (an object)"
    return ""


# Filling a graph ######################################################################################################

Target = tuple[str, ...]  # a node's id and the name of one of its inputs; or a placeholder's name alone
Texts = list[list[Target]]  # for each text input of a node, the strings that it is made of
Thing = TypeVar("Thing")

PROMPTS = {"prompt": "positive", "negative_prompt": "negative"}
ROLES = ("positive", "negative")  # in the order of the outputs of a node that passes both on
PLACEHOLDER = re.compile(r"\{\{ *([\w.:-]+) *\}\}")
# A graph does not have the types of its inputs, so what they are for is told by their names.
CONDITIONING = re.compile(
    r"cond(?!2)|positive|negative|guider|any_|input\d|on_"
)  # the last three are those of switches
TEXT = re.compile(r"text|prompt|string|value|tags|positive|negative")
NO_TEXT = re.compile(r"system|padding|lyrics|encoder|template|type|mode|^clip$")  # other inputs of text encoders
LATENT = re.compile(r"samples|latent|pixels|^image")


def fill(graph: Graph, modifications: dict[str, Any]) -> Graph:
    """The graph with the modifications in it; InvalidModification lists what can be set (`settable` in its details)."""
    known = {name for _, value in _inputs(graph) for name in _placeholders(value)}
    values: dict[Target, Any] = {}
    problems = []
    for name, value in modifications.items():
        try:
            for target in [(name.casefold(),)] if name.casefold() in known else _targets(graph, name):
                converted = _convert(name, value, _kinds(graph, target))
                if values.setdefault(target, converted) != converted:
                    raise InvalidModification(f"{name} and another one of the modifications are for the same input")
        except InvalidModification as error:
            problems.append(str(error))
    left = {target: value for target, value in _inputs(graph) if target not in values}
    missing = {name for value in left.values() for name in _placeholders(value) if (name,) not in values}
    problems += [f"{name} is missing, which the workflow has a placeholder for" for name in sorted(missing)]
    if problems:
        _refuse(graph, sorted(known) + [name for name, role in PROMPTS.items() if _encoders(graph, role)], problems)
    values |= {target: _replace(value, values) for target, value in left.items()}
    return {
        node_id: {**node, "inputs": {name: values[node_id, name] for name in node["inputs"]}}
        for node_id, node in graph.items()
    }


def _kinds(graph: Graph, target: Target) -> list[str]:
    """The types that may replace what the input holds; ComfyUI exports a float of 1.0 as 1."""
    present = _value(graph, target) if target[1:] else "{{}}"
    if isinstance(present, str) and "{{" in present:
        return ["string", "number", "boolean"]
    if not isinstance(present, (str, int, float)):
        raise InvalidModification(f"{'.'.join(target)} is linked to another node, or holds no single value")
    kind = "integer" if present == RANDOM_INT else TYPE_NAMES[type(present)]
    return ["integer", "number"] if kind == "integer" else [kind]


def _refuse(graph: Graph, names: list[str], problems: list[str]) -> NoReturn:
    targets = [target for target, value in _inputs(graph) if isinstance(value, (str, int, float))]
    settable = [{"name": name} for name in names] + [_about(graph, target) for target in targets]
    takes = ", ".join([*names, *(_shown(graph, target) for target in targets)][:40])
    raise InvalidModification(f"{'; '.join(problems[:10])}; what can be set: {takes}", settable=settable)


def _refuse_if(is_unclear: bool, graph: Graph, name: str, targets: list[Target]) -> None:
    if is_unclear:
        choices = ", ".join(_shown(graph, target) for target in targets)
        raise InvalidModification(f"{name} may mean several inputs, choose among {choices}")


def _about(graph: Graph, target: Target) -> dict[str, Any]:
    value = _value(graph, target)
    short = value[:60] + "…" if isinstance(value, str) and len(value) > 60 else value
    return {"name": ".".join(target), "class_type": graph[target[0]]["class_type"], "value": short}


def _shown(graph: Graph, target: Target) -> str:
    return "{name} ({class_type}: {value!r})".format_map(_about(graph, target))


def _inputs(graph: Graph) -> Iterator[tuple[Target, Any]]:
    return (((node_id, name), value) for node_id, node in graph.items() for name, value in node["inputs"].items())


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
    if not isinstance(value, str):
        return value
    if whole := PLACEHOLDER.fullmatch(value):
        return values[(whole[1].casefold(),)]
    return PLACEHOLDER.sub(lambda found: _as_text(values[(found[1].casefold(),)]), value)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _targets(graph: Graph, name: str) -> list[Target]:
    """The inputs that a name means: "NODE_ID.input" (an id may have dots in it) or a bare name."""
    node_id, _, each = name.rpartition(".")
    if node_id in graph and each in graph[node_id]["inputs"]:
        return [(node_id, each)]
    if name in PROMPTS and (found := _prompt(graph, name)):
        return found
    if name in ("width", "height") and (found := _size(graph, name)):
        return found
    names = ("seed", "noise_seed") if name == "seed" else (name,)
    found = _unique(_literal(graph, (node_id, each)) for node_id in graph for each in names)
    if not found:
        why = ": no text feeds the samplers' negative alone" if name == "negative_prompt" else ""
        raise InvalidModification(f"{name} fits nothing in the workflow{why}")
    is_both = all({*found} & {*_flat(_encoders(graph, role))} for role in ROLES)
    # One seed is as good as another, but other values that differ do so for a reason.
    _refuse_if(name != "seed" and (is_both or _differ(graph, found)), graph, name, found)
    return found


def _differ(graph: Graph, targets: list[Target]) -> bool:
    values = [_value(graph, target) for target in targets]
    return values.count(values[0]) < len(values)


def _prompt(graph: Graph, name: str) -> list[Target]:
    """The texts of the encoders that feed the samplers; none where there is no such encoder."""
    encoders = _encoders(graph, PROMPTS[name])
    held = {frozenset(_value(graph, target) for target in _flat([texts])) for texts in encoders}
    is_put_together = any(len(text) > 1 for texts in encoders for text in texts)
    _refuse_if(len(held) > 1 or is_put_together, graph, name, _flat(encoders))
    return _flat(encoders)


def _size(graph: Graph, name: str) -> list[Target]:
    """The width or height of the samplers' latents, and where else it is the same; none without such a latent."""

    def follow(node_id: str) -> list[str]:
        inputs = {} if name in graph[node_id]["inputs"] else graph[node_id]["inputs"]
        return [source for each, value in inputs.items() if LATENT.search(each) for source in _linked(graph, value)]

    starts = [
        source for (_, each), value in _inputs(graph) if each == "latent_image" for source in _linked(graph, value)
    ]
    found = _unique(_literal(graph, (node_id, name)) for node_id in _reached(starts, follow))
    _refuse_if(bool(found) and _differ(graph, found), graph, name, found)
    # What a text encoder calls its width is the size of the pictures that the model was trained on.
    others = [node_id for node_id, node in graph.items() if not _linked(graph, node["inputs"].get("clip"))]
    alike = _unique(_literal(graph, (node_id, name)) for node_id in others)
    return found and _unique([*found, *(each for each in alike if not _differ(graph, [each, found[0]]))])


def _encoders(graph: Graph, role: str) -> list[Texts]:
    """The texts of each node that makes the samplers' positive or negative; a negative made of the prompt is none."""
    side = ROLES.index(role)

    def follow(output: tuple[str, int]) -> list[tuple[str, int]]:
        inputs = graph[output[0]]["inputs"]
        names = [name for name in inputs if CONDITIONING.match(name) and _linked(graph, inputs[name])]
        names = _of_role(names, ROLES[output[1] > 0])
        return [(inputs[name][0], side if name == "guider" else inputs[name][1]) for name in names]

    starts = [(node_id, side) for node_id, node in graph.items() if {*ROLES, "guider"} & node["inputs"].keys()]
    found = [_texts(graph, node_id, role) for node_id, _ in _reached(starts, follow)]
    prompt = {*_flat(_encoders(graph, "positive"))} if role == "negative" else set()
    return [texts for texts in found if texts and prompt.isdisjoint(_flat([texts]))]


def _texts(graph: Graph, node_id: str, role: str) -> Texts:
    def follow(target: Target) -> list[Target]:
        return [text for source in _linked(graph, _value(graph, target)) for text in _text_inputs(graph, source, role)]

    made_of = [_reached([target], follow) for target in _text_inputs(graph, node_id, role)]
    texts = [[each for each in text if isinstance(_value(graph, each), str)] for text in made_of]
    return [text for text in texts if text]


def _text_inputs(graph: Graph, node_id: str, role: str) -> list[Target]:
    """What may be text; an encoder whose inputs have no telling names is known by its clip."""
    inputs = graph[node_id]["inputs"]
    names = [name for name in inputs if not NO_TEXT.search(name)]
    names = [name for name in names if not (CONDITIONING.match(name) and _linked(graph, inputs[name]))]
    telling = [name for name in names if TEXT.search(name)]
    names = telling or (names if _linked(graph, inputs.get("clip")) else [])
    return [(node_id, name) for name in _of_role(names, role)]


def _of_role(names: list[str], role: str) -> list[str]:
    """The names that have the role in them if there are any, else those that do not have the other."""
    other = ROLES[role == "positive"]
    return [name for name in names if role in name] or [name for name in names if other not in name]


def _literal(graph: Graph, target: Target) -> Target | None:
    """The input if it holds a value, or the one that it is linked to if that node has but one, a number."""
    value = _value(graph, target)
    if isinstance(value, (str, int, float)):
        return target
    numbers = [(source, name) for source in _linked(graph, value) for name in graph[source]["inputs"]]
    return numbers[0] if len(numbers) == 1 and isinstance(_value(graph, numbers[0]), (int, float)) else None


def _linked(graph: Graph, value: Any) -> list[str]:
    """The node that an input's value is a link to, if it is one."""
    is_link = isinstance(value, list) and [type(each) for each in value] == [str, int]
    return value[:1] if is_link and value[0] in graph else []


def _reached(starts: Iterable[Thing], follow: Callable[[Thing], list[Thing]]) -> list[Thing]:
    """All that `follow` leads to from the starts, each once."""
    found: dict[Thing, None] = {}
    ahead = list(starts)
    while ahead:
        if (each := ahead.pop()) not in found:
            found[each] = None
            ahead += follow(each)
    return list(found)


def _flat(encoders: list[Texts]) -> list[Target]:
    return _unique(target for texts in encoders for text in texts for target in text)


def _unique(targets: Iterable[Target | None]) -> list[Target]:
    return [target for target in dict.fromkeys(targets) if target]


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
    numbers = {"seed": RANDOM_INT if seed is None else seed, "cfg": cfg if cfg_scale is None else cfg_scale}
    sampling = {"steps": steps, "sampler_name": sampler_name, "scheduler": scheduler, "denoise": denoise}
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {
        "3": {"class_type": "KSampler", "inputs": {**numbers, **sampling, **links}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": width, "height": height, "batch_size": batch_size}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": prompt, "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": negative_prompt, "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
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
    if width is not None or height is not None:  # ImageScale makes of a 0 what keeps the proportions
        size = {"width": width or 0, "height": height or 0, "upscale_method": "lanczos", "crop": "center"}
        graph["11"] = {"class_type": "ImageScale", "inputs": {"image": ["10", 0], **size}}
        graph["5"]["inputs"]["pixels"] = ["11", 0]
    if batch_size != 1:
        graph["12"] = {"class_type": "RepeatLatentBatch", "inputs": {"samples": ["5", 0], "amount": batch_size}}
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
            "ComfyUI has no checkpoint: put one (a .safetensors file) into its folder models/checkpoints"
        )
    return installed[0]
