"""Modifiers build ComfyUI workflows from a request's `modifications`.

A modifier is a function that returns a workflow: a graph in ComfyUI's API format. The function's
signature is its schema: it gives names, types and defaults, and a parameter without a default is
required. A modifier that needs something of the worker asks for it with the keyword-only argument
`context`, which is no part of the schema.

A workflow exported from ComfyUI needs no code. Its file in WORKFLOWS_DIR is a modifier under the
file's name, and `fill` sets the inputs that a request names.

To add a modifier in Python, write a function like those at the end of this file:

    @modifier
    def Inverted(image: str) -> Graph:
        return {
            "1": {"class_type": "LoadImage", "inputs": {"image": image}},
            "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
            "3": {
                "class_type": "SaveImage",
                "inputs": {"images": ["2", 0], "filename_prefix": "inverted"},
            },
        }
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Protocol, Union, get_args, get_origin

# What a modifier works with #######################################################################

JsonObject = dict[str, Any]
Graph = dict[str, JsonObject]  # node id -> {"class_type": …, "inputs": {…}}
Modifier = Callable[..., Graph]

RANDOM_INT = "__RANDOM_INT__"  # The worker replaces it with a fresh integer for each request.


class Context(Protocol):
    """What a modifier may ask of the worker."""

    settings: Any
    """The worker's environment variables by lower-case name, as in settings.default_checkpoint."""

    def choices(self, class_type: str, name: str) -> list[str]:
        """Returns what ComfyUI offers for a node's input: choices("LoraLoader", "lora_name")."""


class InvalidModification(ValueError):
    """What a request asks for cannot be built.

    The client gets the message, and the `details` as further fields of the answer's `error`.
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details


# However much is wrong with a request, its message names no more problems than this.
MAX_PROBLEMS = 10

# Schemas ##########################################################################################

Schema = dict[str, JsonObject]  # parameter -> {"type": ["integer", …], "default": …}

TYPE_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def _convert(name: str, value: Any, types: list[str]) -> Any:
    """Returns the value if it has one of the types, and raises InvalidModification if not.

    JSON does not tell integers from other numbers. So 20.0 is accepted as an integer and becomes
    20, and 20 is accepted as a number.
    """
    if "integer" in types and isinstance(value, float) and value.is_integer():
        value = int(value)
    given = TYPE_NAMES.get(type(value), "")
    is_whole_number = given == "integer" and "number" in types
    if given not in types and not is_whole_number:
        raise InvalidModification(f"{name} has to be {' or '.join(types)}, not {value!r:.60}")
    return value


def _schema(function: Modifier) -> Schema:
    """Returns the schema of a modifier. A required parameter has no "default" in it.

    Raises ValueError where a parameter has no type, or a default of another type.
    """
    schema: Schema = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            # **others stands for the parameters of Text2Image that the function lacks.
            schema = schema | _schema(Text2Image) | schema
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            schema[name] = _parameter_schema(function.__name__, parameter)
    return schema


def _parameter_schema(function: str, parameter: inspect.Parameter) -> JsonObject:
    name, annotation = parameter.name, parameter.annotation
    is_union = get_origin(annotation) in (Union, UnionType)
    types = get_args(annotation) if is_union else (annotation,)
    if not set(types) <= TYPE_NAMES.keys():
        allowed = "str, int, float, bool, or a union of them"
        raise ValueError(f"{function}: {name} needs a type: {allowed}")
    schema: JsonObject = {"type": [TYPE_NAMES[each] for each in types]}
    if parameter.default is not parameter.empty:
        _convert(f"{function}: the default of {name}", parameter.default, schema["type"])
        schema["default"] = parameter.default
    return schema


def _describe_parameter(name: str, parameter: JsonObject) -> str:
    types = " or ".join(parameter["type"])
    need = "optional" if "default" in parameter else "required"
    return f"{name} ({types}, {need})"


def _arguments(function: Modifier, modifications: JsonObject) -> JsonObject:
    """Returns the arguments for the modifier; raises InvalidModification with all problems."""
    schema = _schema(function)
    problems = [f"unknown {name!r}" for name in modifications if name not in schema]
    for name, parameter in schema.items():
        if "default" not in parameter and name not in modifications:
            problems.append(f"{name} is missing")
    arguments = {}
    for name, value in modifications.items():
        if name not in schema:
            continue
        try:
            arguments[name] = _convert(name, value, schema[name]["type"])
        except InvalidModification as error:
            problems.append(str(error))
    if problems:
        told = "; ".join(problems[:MAX_PROBLEMS])
        takes = ", ".join(_describe_parameter(*item) for item in schema.items())
        message = f"{function.__name__}: {told}; there is: {takes}"
        raise InvalidModification(message, schema=schema)
    return arguments


# Workflow files ###################################################################################


def _files(context: Context) -> dict[str, Path]:
    """Returns the workflow files in WORKFLOWS_DIR by name.

    Only a file that is listed here is ever opened, so no name in a request leads out of the folder.
    """
    folder = context.settings.workflows_dir
    if not folder:
        return {}
    return {path.stem: path for path in Path(folder).glob("*.json")}


def _fault(graph: Any) -> str:
    """Returns what is wrong with a graph that should be in API format, or else ""."""
    if not isinstance(graph, dict) or not graph:
        return "is not in API format: it has to be an object of nodes"
    if isinstance(graph.get("nodes"), list):
        return "is in the editor's own format; in ComfyUI, use Workflow > Export (API)"
    for node_id, node in graph.items():
        fields = node if isinstance(node, dict) else {}
        has_type = isinstance(fields.get("class_type"), str)
        if not has_type or not isinstance(fields.get("inputs"), dict):
            needed = "a class_type (a string) and inputs (an object)"
            return f"is not in API format: node {node_id!r} needs {needed}"
    return ""


def load(path: Path) -> Graph:
    """Returns the graph in the file, which has to be in API format.

    Raises InvalidModification where the file cannot be read, or holds something else. The message
    names the file without its folder.
    """
    try:
        text = path.read_text("utf-8-sig")
        # int() raises ValueError for NaN and Infinity, which JSON does not have.
        graph: Graph = json.loads(text, parse_constant=int)
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        fault = f"is not JSON: {error}"
    else:
        fault = _fault(graph)
    if fault:
        raise InvalidModification(f"the workflow file {path.name} {fault}")
    return graph


# Inputs and links #################################################################################


class InputTarget(NamedTuple):
    """An input of a node. As text, it is what a client calls it: "NODE_ID.input"."""

    node_id: str
    name: str

    def __str__(self) -> str:
        return f"{self.node_id}.{self.name}"


class Placeholder(NamedTuple):
    """A {{NAME}} in a graph, which stands for the same value in every input that has it."""

    name: str  # in lower case


Target = InputTarget | Placeholder  # what a modification sets
InputTargets = list[InputTarget]
Values = dict[Target, Any]

# A literal has one of these types. The other inputs are links, null, or have parts of their own.
LITERAL = (str, int, float)
PLACEHOLDER = re.compile(r"\{\{ *([\w.:-]+) *\}\}")


def _inputs(graph: Graph) -> Iterator[tuple[InputTarget, Any]]:
    for node_id, node in graph.items():
        for name, value in node["inputs"].items():
            yield InputTarget(node_id, name), value


def _inputs_named(graph: Graph, *names: str) -> InputTargets:
    return [target for target, _ in _inputs(graph) if target.name in names]


def _value(graph: Graph, target: InputTarget) -> Any:
    """Returns what the input holds, or None where the node has no such input."""
    return graph[target.node_id]["inputs"].get(target.name)


def _placeholders(graph: Graph, replaced: Container[Target] = ()) -> set[str]:
    """Returns the names of the placeholders in all inputs but those that are replaced."""
    kept = [value for target, value in _inputs(graph) if target not in replaced]
    text = json.dumps(kept, ensure_ascii=False)
    return {name.casefold() for name in PLACEHOLDER.findall(text)}


def _source(graph: Graph, target: InputTarget) -> str | None:
    """Returns the id of the node that the input is linked to, or None where it has no link."""
    value = _value(graph, target)
    is_link = isinstance(value, list) and [*map(type, value)] == [str, int]
    return value[0] if is_link and value[0] in graph else None


def _is_text_encoder(graph: Graph, node_id: str) -> bool:
    """Recognizes a text encoder, whatever its class, by its link to a CLIP model."""
    return _source(graph, InputTarget(node_id, "clip")) is not None


def _follow_links(
    graph: Graph, starts: InputTargets, next_inputs: Callable[[str], list[str]]
) -> InputTargets:
    """Returns the inputs to start from, and those that can be reached from them through links.

    `next_inputs` takes the id of a linked node and returns the names of the inputs to go on with.
    """
    reached: dict[InputTarget, None] = {}  # a set that keeps its order
    pending = [*starts]
    while pending:
        target = pending.pop(0)
        if target in reached:
            continue
        reached[target] = None
        source = _source(graph, target)
        if source is not None:
            pending += [InputTarget(source, name) for name in next_inputs(source)]
    return list(reached)


def _literals(graph: Graph, targets: InputTargets) -> InputTargets:
    """Returns those of the inputs that hold a literal.

    Where an input is linked to a node that has nothing but a number, such as PrimitiveInt, the
    input of that node is returned in its place.
    """

    def only_input(node_id: str) -> list[str]:
        input_names = list(graph[node_id]["inputs"])
        return input_names if len(input_names) == 1 else []

    asked = set(targets)
    found = []
    for target in _follow_links(graph, targets, only_input):
        types = LITERAL if target in asked else (int, float)
        if isinstance(_value(graph, target), types):
            found.append(target)
    return found


def _about(graph: Graph, target: InputTarget) -> JsonObject:
    """Returns what a client is told of an input: {"name": …, "class_type": …, "value": …}."""
    value = _value(graph, target)
    if isinstance(value, str) and len(value) > 60:
        value = value[:60] + "…"
    class_type = graph[target.node_id]["class_type"]
    return {"name": str(target), "class_type": class_type, "value": value}


def _show(about: JsonObject) -> str:
    """Returns the same as text, for a message. Placeholders and prompts have only a name."""
    pattern = "{name} ({class_type}: {value!r})" if "value" in about else "{name}"
    return pattern.format_map(about)


# What a name means ################################################################################

PROMPTS = {"prompt": "positive", "negative_prompt": "negative"}  # name -> input of a sampler

# A graph does not have the types of its inputs. These patterns tell what an input is for by its
# name. CONDITIONING fits the inputs for a conditioning or a guider, and those of switches, which
# pass either on (its last three names). It leaves out DualCFGGuider's cond2, since workflows link
# that to the negative prompt.
CONDITIONING = re.compile(r"cond(?!2)|positive|negative|guider|any_|input\d|on_")
# An input takes a prompt's text if TEXT fits its name and NO_TEXT does not.
TEXT = re.compile(r"text|prompt|string|value|^tags|positive|negative")
NO_TEXT = re.compile(r"system|padding|encoder|template|type|mode|^clip$")
# LATENT fits the inputs for a latent, and for the picture that a node encodes into one.
LATENT = re.compile(r"samples|latent|pixels|^image")


def _ambiguous(graph: Graph, name: str, targets: InputTargets) -> InvalidModification:
    choices = ", ".join(_show(_about(graph, target)) for target in targets)
    return InvalidModification(f"{name} may mean several inputs, choose among {choices}")


def _require_equal(graph: Graph, name: str, targets: InputTargets) -> None:
    """Raises InvalidModification where the inputs hold different values.

    A workflow has a reason for such a difference. So a client may mean only one of the inputs.
    """
    values = [_value(graph, target) for target in targets]
    if any(value != values[0] for value in values):
        raise _ambiguous(graph, name, targets)


def _exact_input(graph: Graph, name: str) -> InputTargets:
    """The name "NODE_ID.input" means that one input. The node's id may have dots in it."""
    node_id, _, input_name = name.rpartition(".")
    if node_id in graph and input_name in graph[node_id]["inputs"]:
        return [InputTarget(node_id, input_name)]
    return []


def _of_role(names: list[str], role: str) -> list[str]:
    """Returns the names that contain the role, or else those that do not contain the other role."""
    other = "negative" if role == "positive" else "positive"
    own = [name for name in names if role in name]
    return own or [name for name in names if other not in name]


def _prompt_inputs(graph: Graph, node_id: str, role: str) -> list[str]:
    """Returns the names of the node's inputs that lead to the texts for that role."""
    conditionings = []
    candidates = []
    for name in graph[node_id]["inputs"]:
        source = _source(graph, InputTarget(node_id, name))
        if source is not None and CONDITIONING.match(name):
            conditionings.append(name)
        if not NO_TEXT.search(name):
            candidates.append(name)
    texts = [name for name in candidates if TEXT.search(name)]
    if not texts and _is_text_encoder(graph, node_id):
        texts = candidates  # Some encoders name their texts after models, such as t5xxl.
    return _of_role(conditionings, role) + _of_role(texts, role)


def _texts(graph: Graph, role: str) -> InputTargets:
    """Returns the inputs with the texts that feed the samplers' positive or negative.

    A text that feeds both is left out of the negative ones: a Flux workflow zeroes its positive
    conditioning to get a negative one, and has no text for it.
    """
    starts = _inputs_named(graph, role, "guider")
    reached = _follow_links(graph, starts, lambda node_id: _prompt_inputs(graph, node_id, role))
    texts = [target for target in reached if isinstance(_value(graph, target), str)]
    if role == "positive":
        return texts
    positive = _texts(graph, "positive")
    return [target for target in texts if target not in positive]


def _prompt(graph: Graph, name: str) -> InputTargets:
    """The names `prompt` and `negative_prompt` mean the texts that feed the samplers."""
    if name not in PROMPTS:
        return []
    found = _texts(graph, PROMPTS[name])
    nodes = {target.node_id for target in found}
    # The texts of a single encoder may differ, since they belong to the same prompt.
    if len(nodes) != 1 or not _is_text_encoder(graph, found[0].node_id):
        _require_equal(graph, name, found)
    return found


def _size(graph: Graph, name: str) -> InputTargets:
    """The names `width` and `height` mean the size of the latents that the samplers start from.

    An input of another node is meant as well if it has the same name and the same value.
    """
    if name not in ("width", "height"):
        return []

    def size_inputs(node_id: str) -> list[str]:
        inputs = graph[node_id]["inputs"]
        if name in inputs:
            return [name]
        return [each for each in inputs if LATENT.search(each)]

    reached = _follow_links(graph, _inputs_named(graph, "latent_image"), size_inputs)
    found = _literals(graph, [target for target in reached if target.name == name])
    if not found:
        return []
    _require_equal(graph, name, found)
    for target in _inputs_named(graph, name):
        # A text encoder's size stays: it is that of the pictures that the model was trained on.
        if not _is_text_encoder(graph, target.node_id):
            found.append(target)
    size = _value(graph, found[0])
    return [target for target in _literals(graph, found) if _value(graph, target) == size]


def _bare_name(graph: Graph, name: str) -> InputTargets:
    """A bare name means every input of that name, and `seed` means `noise_seed` as well."""
    if name == "seed":
        # Seeds differ without a reason, so the client means all of them.
        return _literals(graph, _inputs_named(graph, "seed", "noise_seed"))
    found = _literals(graph, _inputs_named(graph, name))
    # A name that is in both prompts, such as `text`, is ambiguous even if the texts are equal.
    if all(set(found).intersection(_texts(graph, role)) for role in PROMPTS.values()):
        raise _ambiguous(graph, name, found)
    _require_equal(graph, name, found)
    return found


def _targets(graph: Graph, name: str, placeholders: set[str]) -> Sequence[Target]:
    """Returns what a name means, by the first rule that finds something.

    Raises InvalidModification where no rule finds anything, and where the name is ambiguous.
    """
    if name.casefold() in placeholders:
        return [Placeholder(name.casefold())]
    for rule in (_exact_input, _prompt, _size, _bare_name):
        found = rule(graph, name)
        if found:
            return found
    why = ": no text feeds the samplers' negative alone" if name == "negative_prompt" else ""
    raise InvalidModification(f"{name!r:.80} fits nothing in the workflow{why}")


# Filling a graph ##################################################################################

MAX_SETTABLE = 40  # A message lists no more of what can be set. The details list everything.

# A placeholder does not have the type of the value that it stands for.
PLACEHOLDER_TYPES = ["string", "number", "boolean"]


def _settable(graph: Graph) -> list[JsonObject]:
    """Returns what can be set: the placeholders and the prompts, and then every literal."""
    prompts = {name for name, role in PROMPTS.items() if _texts(graph, role)}
    settable = [{"name": name} for name in sorted(_placeholders(graph) | prompts)]
    for target, value in _inputs(graph):
        if isinstance(value, LITERAL):
            settable.append(_about(graph, target))
    return settable


def _types(graph: Graph, target: Target) -> list[str]:
    """Returns the types that a value for the target may have, going by the present value."""
    if isinstance(target, Placeholder):
        return PLACEHOLDER_TYPES
    present = _value(graph, target)
    if isinstance(present, str) and "{{" in present:
        return PLACEHOLDER_TYPES
    if not isinstance(present, LITERAL):
        raise InvalidModification(f"{target} is linked to another node, or holds no single value")
    if present == RANDOM_INT or type(present) is int:
        return ["integer", "number"]  # A float may look like this: ComfyUI exports 1.0 as 1.
    return [TYPE_NAMES[type(present)]]


def _parse(graph: Graph, modifications: JsonObject) -> tuple[Values, list[str]]:
    """Returns the values to set, and the problems of the modifications that cannot be made."""
    placeholders = _placeholders(graph)
    values: Values = {}
    problems = []
    for name, value in modifications.items():
        try:
            targets = _targets(graph, name, placeholders)
            new = {target: _convert(name, value, _types(graph, target)) for target in targets}
            if any(values.get(target, each) != each for target, each in new.items()):
                problem = "sets an input that another modification sets as well"
                raise InvalidModification(f"{name} {problem}")
            values |= new
        except InvalidModification as error:
            problems.append(str(error))
        if len(problems) == MAX_PROBLEMS:
            break
    return values, problems


def _placeholder_problems(graph: Graph, values: Values) -> list[str]:
    """Finds placeholders without a value, and values whose placeholder is not there any more."""
    left = _placeholders(graph, replaced=values)
    given = {target.name for target in values if isinstance(target, Placeholder)}
    without_value = "is missing, which the workflow has a placeholder for"
    without_placeholder = "fills a text that another modification replaces"
    problems = [f"{name} {without_value}" for name in sorted(left - given)]
    problems += [f"{name} {without_placeholder}" for name in sorted(given - left)]
    return problems


def _steps_problems(graph: Graph, values: Values) -> list[str]:
    """Finds samplers that new `steps` leave nothing to do.

    Samplers can share the steps of a picture. Each but the first has a `start_at_step` above 0.
    """
    problems = []
    for target, steps in values.items():
        if not isinstance(target, InputTarget) or target.name != "steps":
            continue
        start = InputTarget(target.node_id, "start_at_step")
        first_step = values.get(start, _value(graph, start))
        # A placeholder for the steps takes a string as well.
        are_numbers = isinstance(first_step, int) and isinstance(steps, (int, float))
        if are_numbers and 0 < first_step >= steps:
            problems.append(f"{start} is not below steps: name both")
    return problems


def _replace(value: Any, values: Values) -> Any:
    """Returns what an input holds with all its placeholders replaced by their values.

    A string that is nothing but a placeholder becomes the value itself, with its type. In a longer
    string the value is put in as text.
    """
    if isinstance(value, dict):
        return {name: _replace(each, values) for name, each in value.items()}
    if isinstance(value, list):
        return [_replace(each, values) for each in value]
    if not isinstance(value, str):
        return value
    if whole := PLACEHOLDER.fullmatch(value):
        return values[Placeholder(whole[1].casefold())]
    return PLACEHOLDER.sub(lambda found: str(_replace(found[0], values)), value)


def _apply(graph: Graph, values: Values) -> Graph:
    """Returns a copy of the graph in which every target has its value."""
    filled = {}
    for node_id, node in graph.items():
        inputs = {}
        for name, value in node["inputs"].items():
            target = InputTarget(node_id, name)
            inputs[name] = values[target] if target in values else _replace(value, values)
        filled[node_id] = {**node, "inputs": inputs}
    return filled


def fill(graph: Graph, modifications: JsonObject) -> Graph:
    """Returns a copy of the graph with the modifications {name: value} in it.

    Raises InvalidModification where any of them cannot be made. Its message names the problems.
    Its details have `settable`, a list of what can be set: {"name": …} for a placeholder or a
    prompt, {"name": "NODE_ID.input", "class_type": …, "value": …} for an input.
    """
    values, problems = _parse(graph, modifications)
    problems += _placeholder_problems(graph, values)
    problems += _steps_problems(graph, values)
    if problems:
        settable = _settable(graph)
        told = "; ".join(problems[:MAX_PROBLEMS])
        takes = ", ".join(_show(about) for about in settable[:MAX_SETTABLE])
        raise InvalidModification(f"{told}; what can be set: {takes}", settable=settable)
    return _apply(graph, values)


# Modifiers by name ################################################################################

MODIFIERS: dict[str, Modifier] = {}


def modifier(function: Modifier) -> Modifier:
    """Makes the function a modifier under its own name.

    Raises ValueError, so that the worker does not start, where the name is taken or where the
    signature makes no schema.
    """
    if function.__name__ in MODIFIERS:
        raise ValueError(f"there are two modifiers of the name {function.__name__}")
    _schema(function)
    MODIFIERS[function.__name__] = function
    return function


def names(context: Context) -> list[str]:
    """Returns the names of all modifiers: of the functions, and of the files in WORKFLOWS_DIR."""
    return sorted({*MODIFIERS, *_files(context)})


def _call(function: Modifier, modifications: JsonObject, context: Context) -> Graph:
    """Calls the modifier with what its signature asks for."""
    wanted = inspect.signature(function).parameters
    extra = {}
    if "context" in wanted:
        extra["context"] = context
    if "modifications" in wanted:  # The modifier takes them unchecked.
        return function(modifications=modifications, **extra)
    return function(**_arguments(function, modifications), **extra)


def build(name: str, modifications: JsonObject, context: Context) -> Graph:
    """Returns the graph that the modifier of that name builds from modifications {name: value}.

    Raises InvalidModification. Its details have `modifiers`, a list of names, where there is no
    such modifier. They have the `schema` of a function, or what is `settable` in a workflow file,
    where the modifications do not fit it.
    """
    if name in MODIFIERS:
        return _call(MODIFIERS[name], modifications, context)
    files = _files(context)
    if name in files:
        return fill(load(files[name]), modifications)
    listed = names(context)
    message = f"there is no modifier {name!r:.80}; there is: {', '.join(listed)}"
    raise InvalidModification(message, modifiers=listed)


# The modifiers ####################################################################################


def _node(class_type: str, **inputs: Any) -> JsonObject:
    return {"class_type": class_type, "inputs": inputs}


def _default_checkpoint(context: Context) -> str:
    """Returns DEFAULT_CHECKPOINT, or else the first checkpoint that ComfyUI lists."""
    chosen: str = context.settings.default_checkpoint
    if chosen:
        return chosen
    installed = context.choices("CheckpointLoaderSimple", "ckpt_name")
    if not installed:
        raise InvalidModification(
            "ComfyUI has no checkpoint: put a .safetensors file into its models/checkpoints"
        )
    return installed[0]


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
    """Makes a picture from a text, with a Stable Diffusion checkpoint.

    Without a seed it takes a random one. `cfg_scale` is another name for `cfg`.
    """
    checkpoint = _default_checkpoint(context) if ckpt_name is None else ckpt_name
    return {
        "3": _node(
            "KSampler",
            seed=RANDOM_INT if seed is None else seed,
            cfg=cfg if cfg_scale is None else cfg_scale,
            steps=steps,
            sampler_name=sampler_name,
            scheduler=scheduler,
            denoise=denoise,
            model=["4", 0],
            positive=["6", 0],
            negative=["7", 0],
            latent_image=["5", 0],
        ),
        "4": _node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "5": _node("EmptyLatentImage", width=width, height=height, batch_size=batch_size),
        "6": _node("CLIPTextEncode", text=prompt, clip=["4", 1]),
        "7": _node("CLIPTextEncode", text=negative_prompt, clip=["4", 1]),
        "8": _node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": _node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
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
    """Makes a picture from a text and another picture. The rest is as in Text2Image.

    `input_image` is a name in ComfyUI's input folder, a URL or a data URI. The picture keeps its
    size unless a width or a height is given.
    """
    graph = Text2Image(prompt, denoise=denoise, context=context, **others)
    graph["10"] = _node("LoadImage", image=input_image)
    graph["5"] = _node("VAEEncode", pixels=["10", 0], vae=["4", 2])
    if width is not None or height is not None:
        graph["11"] = _node(
            "ImageScale",
            image=["10", 0],
            width=width or 0,  # ImageScale replaces a 0 by what keeps the proportions.
            height=height or 0,
            upscale_method="lanczos",
            crop="center",
        )
        graph["5"]["inputs"]["pixels"] = ["11", 0]
    if batch_size != 1:
        graph["12"] = _node("RepeatLatentBatch", samples=["5", 0], amount=batch_size)
        graph["3"]["inputs"]["latent_image"] = ["12", 0]
    return graph


@modifier
def RawWorkflow(*, modifications: JsonObject, context: Context) -> Graph:
    """Fills the workflow in WORKFLOW_FILE, or that of Text2Image where there is none."""
    file = context.settings.workflow_file
    graph = load(Path(file)) if file else Text2Image("", context=context)
    return fill(graph, modifications)
