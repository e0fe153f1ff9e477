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
import reprlib
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from difflib import get_close_matches
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
MAX_LISTED = 15  # The same for lists of what there is. The details have all of it.


def _listed(items: list[str]) -> str:
    shown = ", ".join(items[:MAX_LISTED])
    return shown if len(items) <= MAX_LISTED else f"{shown} and {len(items) - MAX_LISTED} more"


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean …?)" with the known names that are like the name, or else "".

    The comparison is slow, so it leaves out long names and what comes after two thousand names.
    """
    short = [each for each in known if len(each) <= 60]
    nearest = get_close_matches(name[:60].casefold(), short[:2000])
    return f" (did you mean {' or '.join(nearest)}?)" if nearest else ""


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
        raise InvalidModification(
            f"{name} has to be {' or '.join(types)}, not {reprlib.repr(value)}"
        )
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
        raise ValueError(
            f"{function}: {name} needs a type: str, int, float, bool, or a union of them"
        )
    schema: JsonObject = {"type": [TYPE_NAMES[each] for each in types]}
    if parameter.default is not parameter.empty:
        _convert(f"{function}: the default of {name}", parameter.default, schema["type"])
        schema["default"] = parameter.default
    return schema


def _arguments(function: Modifier, modifications: JsonObject) -> JsonObject:
    """Returns the arguments for the modifier; raises InvalidModification with all problems."""
    schema = _schema(function)
    unknown = [name for name in modifications if name not in schema][:MAX_PROBLEMS]
    problems = [f"unknown {name[:80]!r}{_did_you_mean(name, schema)}" for name in unknown]
    arguments = {}
    for name, parameter in schema.items():
        if name in modifications:
            try:
                arguments[name] = _convert(name, modifications[name], parameter["type"])
            except InvalidModification as error:
                problems.append(str(error))
        elif "default" not in parameter:
            problems.append(f"{name} is missing")
    if problems:
        told = "; ".join(problems[:MAX_PROBLEMS])
        raise InvalidModification(
            f"{function.__name__}: {told}; there is: {_listed(list(schema))}", schema=schema
        )
    return arguments


# Workflow files ###################################################################################


def _files(context: Context) -> dict[str, Path]:
    """Returns the workflow files in WORKFLOWS_DIR by name.

    Only a file that is listed here is ever opened, so no name in a request leads out of the folder.
    """
    folder = context.settings.workflows_dir
    with suppress(OSError):  # it cannot be listed, which `file_faults` tells
        return {path.stem: path for path in Path(folder).glob("*.json")} if folder else {}
    return {}


def _fault(graph: Any) -> str:
    """Returns what is wrong with a graph that should be in API format, or else ""."""
    if not isinstance(graph, dict) or not graph:
        return "is not in API format: it has to be an object of nodes"
    if isinstance(graph.get("nodes"), list):
        return "is in the editor's own format; in ComfyUI, use Workflow > Export (API)"
    for node_id, node in graph.items():
        match node:
            case {"class_type": str(), "inputs": dict()}:
                continue
        return (
            f"is not in API format: node {node_id!r} needs a class_type (a string) and inputs"
            " (an object)"
        )
    return ""


def load(path: Path) -> Graph:
    """Returns the graph in the file, which has to be in API format.

    Raises InvalidModification where the file cannot be read, or holds something else. The message
    names the file without its folder.
    """
    try:
        # int() raises ValueError for NaN and Infinity, which JSON does not have.
        graph: Graph = json.loads(path.read_text("utf-8-sig"), parse_constant=int)
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        fault = f"is not JSON: {error}"
    else:
        fault = _fault(graph)
    if fault:
        raise InvalidModification(f"the workflow file {path.name} {fault}")
    return graph


def file_faults(context: Context) -> Iterator[str]:
    """Yields a message for each workflow file that cannot be used."""
    folder = context.settings.workflows_dir
    try:
        list(Path(folder).iterdir() if folder else ())
    except FileNotFoundError:
        pass  # the worker tells that of each path
    except OSError as error:
        yield f"WORKFLOWS_DIR cannot be read: {error.strerror}"
    for path in [*_files(context).values(), Path(context.settings.workflow_file)]:
        try:
            if path.is_file():
                load(path)
        except InvalidModification as error:
            yield str(error)


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


def _value(graph: Graph, target: InputTarget) -> Any:
    """Returns what the input holds, or None where the node has no such input."""
    return graph[target.node_id]["inputs"].get(target.name)


def _title(node: JsonObject) -> JsonObject:
    """Returns {"title": …} as the node has it in the editor, or {} where the export lacks it."""
    match node:
        case {"_meta": {"title": str(title)}}:
            return {"title": title[:100]}
    return {}


def _placeholders(graph: Graph, replaced: Container[Target] = ()) -> set[str]:
    """Returns the names of the placeholders in all inputs but those that are replaced."""
    kept = [value for target, value in _inputs(graph) if target not in replaced]
    text = json.dumps(kept, ensure_ascii=False)
    return {name.casefold() for name in PLACEHOLDER.findall(text)}


# Links ############################################################################################

# A switch has an input that tells which of the others it passes on. It does so by the end of their
# names: "true" in on_true, or a number.
SELECTOR = re.compile(r"(?i)switch|select|index|boolean|condition|input")
BRANCH = re.compile(r"(?:true|false|(?<!\d)\d+)$")


def _source(graph: Graph, target: InputTarget) -> str | None:
    """Returns the id of the node that the input is linked to, or None where it has no link."""
    match _value(graph, target):
        case [str(node_id), int()] if node_id in graph:
            return node_id
    return None


def _is_text_encoder(graph: Graph, node_id: str) -> bool:
    """Recognizes a text encoder, whatever its class, by its link to a CLIP model."""
    return _source(graph, InputTarget(node_id, "clip")) is not None


def _passed_on(graph: Graph, node_id: str) -> list[str]:
    """Returns the inputs that the node passes on as they are, if it is a switch or has only one."""
    inputs = graph[node_id]["inputs"]
    if len(inputs) == 1:
        # A loader has nothing but a file's name, which it does not pass on.
        return [
            name for name, value in inputs.items() if TEXT.search(name) or type(value) is not str
        ]
    ending = ""
    for selector in filter(SELECTOR.fullmatch, inputs):
        source = _source(graph, InputTarget(node_id, selector))
        linked = {} if source is None else graph[source]["inputs"]
        ending = json.dumps(linked.get("value", inputs[selector]))
    branches = {name: BRANCH.search(name.casefold()) for name in inputs}
    return [name for name, branch in branches.items() if branch and branch[0] == ending]


def _follow_links(
    graph: Graph,
    starts: InputTargets,
    next_inputs: Callable[[str], list[str]] = lambda node_id: [],
) -> InputTargets:
    """Returns the inputs to start from, and those that can be reached from them through links.

    Of a node that passes an input on, only that is followed. For any other node, `next_inputs`
    takes its id and returns the names of the inputs to go on with.
    """
    reached = [*starts]
    visited: set[str] = set()
    for target in reached:  # which grows on the way
        source = _source(graph, target)
        if source is not None and source not in visited:
            visited.add(source)
            names = _passed_on(graph, source) or next_inputs(source)
            reached += [InputTarget(source, name) for name in names]
    return list(dict.fromkeys(reached))


def _literals(graph: Graph, targets: InputTargets) -> InputTargets:
    """Returns those of the inputs that hold a literal.

    Where nodes pass a value on to a linked input, the input that holds it is returned in its place.
    """
    reached = _follow_links(graph, targets)
    return [target for target in reached if isinstance(_value(graph, target), LITERAL)]


# What can be set ##################################################################################


def _about(graph: Graph, target: InputTarget) -> JsonObject:
    """Returns what a client is told of an input: {"name": …, "class_type": …, "value": …}.

    It has a "title" as well if the node has one.
    """
    value = _value(graph, target)
    if isinstance(value, str) and len(value) > 60:
        value = f"{value:.60}…"
    node = graph[target.node_id]
    return {"name": str(target), "class_type": node["class_type"], "value": value} | _title(node)


def _choices(graph: Graph, targets: InputTargets) -> str:
    """Returns the same of several inputs as text, for a message."""
    choices = []
    for target in targets:
        about = _about(graph, target)
        title = f'"{about["title"]}", ' if "title" in about else ""
        choices.append(f"{about['name']} ({title}{about['class_type']}: {about['value']!r})")
    return _listed(choices)


def _ambiguous(graph: Graph, name: str, targets: InputTargets) -> InvalidModification:
    return InvalidModification(
        f"{name} may mean several inputs, choose among {_choices(graph, targets)}"
    )


def _set_instead(graph: Graph, targets: InputTargets) -> InputTargets:
    """Returns the literals to set for the inputs: their own, or those that nodes pass on to them.

    Raises InvalidModification, which tells where the value comes from, if there is none.
    """
    found = _literals(graph, targets)
    if found or not targets:
        return found
    target = targets[0]
    *_, last = _follow_links(graph, [target])
    source = _source(graph, last)
    if source is None:
        raise InvalidModification(f"{target} holds no single value")
    behind = _follow_links(graph, [target], lambda node_id: list(graph[node_id]["inputs"]))
    choices = _choices(graph, _literals(graph, behind)) or "nothing"
    raise InvalidModification(
        f"{target} ({graph[target.node_id]['class_type']}) comes from node {source}"
        f" ({graph[source]['class_type']}); to set instead: {choices}"
    )


# What a name means ################################################################################

# What is in the name of an input that leads to the prompt, and to the other prompt.
PROMPTS = {"prompt": ("positive", "neg"), "negative_prompt": ("neg", "positive")}

# A graph does not have the types of its inputs. These patterns tell what an input is for by its
# name. SAMPLER fits the inputs by which a sampler, or what stands before one, has its prompts.
SAMPLER = re.compile(
    r"positive|negative|(neg_)?conditioning|guider|(text|prompt|hyvid|kolors)_embeds"
)
# CONDITIONING fits the inputs for a conditioning or a guider, and those of switches, which pass
# either on (its last three names). It leaves out DualCFGGuider's cond2, since workflows link that
# to the negative prompt.
CONDITIONING = re.compile(
    r"positive|neg|cond(?!2)|guider|(text|original_text|prompt|hyvid|kolors)_embeds"
    r"|any_|input\d|on_"
)
# An input takes a prompt's text if TEXT fits its name and NO_TEXT does not.
TEXT = re.compile(r"text|prompt|string|value|replace|^tags|positive|negative")
NO_TEXT = re.compile(r"system|padding|encoder|template|type|mode|name|^clip$")
# LATENT fits the inputs for a latent, and for the picture that a node encodes into one.
LATENT = re.compile(r"samples|latent|pixels|^image")


Index = defaultdict[str, InputTargets]


class Workflow(Graph):
    """A graph with what the names in a request can mean, looked up once for all of them."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.placeholders = _placeholders(graph)
        self.named = Index(list)  # by "NODE_ID.input", by "input", and by the last part of that
        self.titled = Index(list)  # by "title" and "title.input", in lower case
        for target, value in _inputs(graph):
            short = target.name.rpartition(".")[2]  # "width" of "resize_type.width"
            synonym = "seed" if short == "noise_seed" else short
            for name in (str(target), target.name, short, synonym):
                self.named[name].append(target)
            title = _title(graph[target.node_id]).get("title", "").casefold()
            if title and isinstance(value, LITERAL):
                self.titled[title].append(target)
                self.titled[f"{title}.{target.name.casefold()}"].append(target)
        self.texts = {prompt: dict.fromkeys(_texts(graph, prompt)) for prompt in PROMPTS}
        # A Flux workflow zeroes its positive conditioning to get a negative one, and has no text
        # for that.
        for target in self.texts["prompt"]:
            self.texts["negative_prompt"].pop(target, None)
        self.prompts = [prompt for prompt, texts in self.texts.items() if texts]


def _require_equal(graph: Graph, name: str, targets: InputTargets) -> set[Any]:
    """Returns the value of the inputs, and raises InvalidModification where it is not the same.

    A workflow has a reason for such a difference. So a client may mean only one of the inputs.
    """
    values = {_value(graph, target) for target in targets}
    if len(values) > 1:
        raise _ambiguous(graph, name, targets)
    return values


def _of_prompt(names: list[str], prompt: str) -> list[str]:
    """Returns the names that belong to the prompt, or else those that do not to the other."""
    own, other = PROMPTS[prompt]
    return [name for name in names if own in name] or [name for name in names if other not in name]


def _prompt_inputs(graph: Graph, node_id: str, prompt: str) -> list[str]:
    """Returns the names of the node's inputs that lead to the texts for that prompt."""
    candidates = [name for name in graph[node_id]["inputs"] if not NO_TEXT.search(name)]
    conditionings = list(filter(CONDITIONING.match, candidates))
    texts = list(filter(TEXT.search, candidates))
    if not texts and _is_text_encoder(graph, node_id):
        texts = candidates  # Some encoders name their texts after models, such as t5xxl.
    return _of_prompt(conditionings, prompt) + _of_prompt(texts, prompt)


def _texts(graph: Graph, prompt: str) -> InputTargets:
    """Returns the inputs with the texts from which the samplers' positive or negative comes."""
    starts = []
    for node_id, node in graph.items():
        names = list(filter(SAMPLER.fullmatch, node["inputs"]))
        if names != ["conditioning"]:  # That is a node on the way, such as ControlNetApply.
            starts += [InputTarget(node_id, name) for name in _of_prompt(names, prompt)]
    reached = _follow_links(graph, starts, lambda node_id: _prompt_inputs(graph, node_id, prompt))
    return [target for target in reached if isinstance(_value(graph, target), str)]


def _prompt(graph: Workflow, name: str) -> InputTargets:
    """The names `prompt` and `negative_prompt` mean the texts that feed the samplers."""
    found = list(graph.texts.get(name, []))
    nodes = {target.node_id for target in found}
    # The texts of a single encoder may differ, since they belong to the same prompt.
    if len(nodes) != 1 or not _is_text_encoder(graph, found[0].node_id):
        _require_equal(graph, name, found)
    return found


def _size(graph: Workflow, name: str) -> InputTargets:
    """The names `width` and `height` mean the size of the latents that the samplers start from.

    An input of another node is meant as well if it has the same name and the same value.
    """
    if name not in ("width", "height"):
        return []

    def size_inputs(node_id: str) -> list[str]:
        inputs = graph[node_id]["inputs"]
        sizes = [each for each in inputs if f".{each}".endswith(f".{name}")]
        return sizes or list(filter(LATENT.search, inputs))

    reached = _follow_links(graph, graph.named.get("latent_image", []), size_inputs)
    sizes = [target for target in reached if f".{target}".endswith(f".{name}")]
    size = _require_equal(graph, name, _set_instead(graph, sizes))
    # A text encoder's size stays: it is that of the pictures that the model was trained on.
    sizes += [
        target
        for target in graph.named.get(name, [])
        if not _is_text_encoder(graph, target.node_id)
    ]
    return [target for target in _literals(graph, sizes) if _value(graph, target) in size]


def _bare_name(graph: Workflow, name: str) -> InputTargets:
    """A bare name means every input of that name, and "NODE_ID.input" one.

    The name may be the last part of a dynamic input's name, and `seed` means `noise_seed` as well.
    """
    found = _set_instead(graph, graph.named.get(name, []))
    # A name that is in both prompts, such as `text`, is ambiguous even if the texts are equal.
    if all(texts.keys() & found for texts in graph.texts.values()):
        raise _ambiguous(graph, name, found)
    if name != "seed":  # Seeds differ without a reason, so the client means all of them.
        _require_equal(graph, name, found)
    return found


def _targets(graph: Workflow, name: str) -> Iterable[Target]:
    """Returns what a name means, by the first rule that finds something.

    The title of a node counts where the rules find nothing that can be set, or more than one thing.
    Raises InvalidModification where no rule finds anything, and where the name is ambiguous.
    """
    key = name.casefold()
    if key in graph.placeholders:
        return [Placeholder(key)]
    titled = graph.titled.get(key, [])
    try:
        for rule in (_prompt, _size, _bare_name):
            if found := rule(graph, name):
                return found
    except InvalidModification:
        if len(titled) != 1:
            raise
    if len(titled) > 1:
        raise _ambiguous(graph, name, titled)
    if titled:
        return titled
    why = ": no text feeds the samplers' negative alone" if name == "negative_prompt" else ""
    same = [*dict.fromkeys(map(str, graph.named.get(name.rpartition(".")[2], [])))]
    near = f" (did you mean {' or '.join(same[:3])}?)"
    if not same:
        near = _did_you_mean(name, [*graph.prompts, *graph.named, *graph.titled])
    raise InvalidModification(f"{name[:80]!r} fits nothing in the workflow{why}{near}")


# Filling a graph ##################################################################################

# A placeholder does not have the type of the value that it stands for.
PLACEHOLDER_TYPES = ["string", "number", "boolean"]


def _types(graph: Graph, target: Target) -> list[str]:
    """Returns the types that a value for the target may have, going by the present value."""
    if isinstance(target, Placeholder):
        return PLACEHOLDER_TYPES
    present = _value(graph, target)
    if isinstance(present, str) and "{{" in present:
        return PLACEHOLDER_TYPES
    if present == RANDOM_INT or type(present) is int:
        return ["integer", "number"]  # A float may look like this: ComfyUI exports 1.0 as 1.
    return [TYPE_NAMES[type(present)]]


def _new_values(graph: Workflow, name: str, value: Any, values: Values) -> Values:
    """Returns what a modification sets, and raises InvalidModification if it cannot be made."""
    new = {target: _convert(name, value, _types(graph, target)) for target in _targets(graph, name)}
    if any(values.get(target, each) != each for target, each in new.items()):
        raise InvalidModification(f"{name} sets an input that another modification sets as well")
    return new


def _parse(graph: Graph, modifications: JsonObject) -> tuple[Values, list[str]]:
    """Returns the values to set, and the problems of the modifications that cannot be made.

    What a name means can depend on a switch. So true and false, and whatever has a node's id in its
    name, are set before the others are looked up.
    """
    values: Values = {}
    problems: list[str] = []
    workflow = Workflow(graph)
    for is_late in (False, True):
        if values:
            workflow = Workflow(_apply(graph, values))
        for name, value in modifications.items():
            if is_late is ("." in name or isinstance(value, bool)) or len(problems) == MAX_PROBLEMS:
                continue
            try:
                values |= _new_values(workflow, name, value, values)
            except InvalidModification as error:
                problems.append(str(error))
    return values, problems


def _placeholder_problems(graph: Graph, values: Values) -> list[str]:
    """Finds placeholders without a value, and values whose placeholder is not there any more."""
    left = _placeholders(graph, replaced=values)
    given = {target.name for target in values if isinstance(target, Placeholder)}
    return [
        *(
            f"{name} is missing, which the workflow has a placeholder for"
            for name in sorted(left - given)
        ),
        *(
            f"{name} fills a text that another modification replaces"
            for name in sorted(given - left)
        ),
    ]


def _steps_problems(graph: Graph, values: Values) -> list[str]:
    """Finds samplers that new `steps` leave nothing to do.

    Samplers can share the steps of a picture. Each but the first has a `start_at_step` above 0.
    """
    problems = []
    for node_id in graph:
        steps = values.get(InputTarget(node_id, "steps"))
        start = InputTarget(node_id, "start_at_step")
        # A placeholder for the steps takes a string as well.
        match values.get(start, _value(graph, start)), steps:
            case int(first_step), int() | float() if 0 < first_step >= steps:
                problems.append(f"{start} is not below steps: name both")
    return problems


def _replace(value: Any, values: Values) -> Any:
    """Returns what an input holds with all its placeholders replaced by their values.

    A string that is nothing but a placeholder becomes the value itself, with its type. In a longer
    string the value is put in as text.
    """
    match value:
        case dict():
            return {name: _replace(each, values) for name, each in value.items()}
        case list():
            return [_replace(each, values) for each in value]
        case str():
            if whole := PLACEHOLDER.fullmatch(value):
                return values.get(Placeholder(whole[1].casefold()), value)
            return PLACEHOLDER.sub(lambda found: str(_replace(found[0], values)), value)
    return value


def _apply(graph: Graph, values: Values) -> Graph:
    """Returns a copy of the graph in which every target has its value."""
    filled = {node_id: {**node, "inputs": {}} for node_id, node in graph.items()}
    for target, value in _inputs(graph):
        filled[target.node_id]["inputs"][target.name] = values.get(target, _replace(value, values))
    return filled


def fill(graph: Graph, modifications: JsonObject) -> Graph:
    """Returns a copy of the graph with the modifications {name: value} in it.

    Raises InvalidModification where any of them cannot be made. Its message names the problems.
    Its details have `settable`, a list of what can be set: {"name": …} for a placeholder or a
    prompt, {"name": "NODE_ID.input", "class_type": …, "value": …, "title": …} for an input, the
    last where its node has one.
    """
    values, problems = _parse(graph, modifications)
    problems += _placeholder_problems(graph, values)
    problems += _steps_problems(graph, values)
    if problems:
        workflow = Workflow(graph)
        names = sorted({*workflow.placeholders, *workflow.prompts})
        literals = [target for target, value in _inputs(graph) if isinstance(value, LITERAL)]
        told = "; ".join(problems[:MAX_PROBLEMS])
        settable = [{"name": name} for name in names]
        settable += [_about(graph, target) for target in literals]
        takes = _listed([each["name"] for each in settable])
        message = f"{told}; what can be set: {takes}; error.settable tells more"
        raise InvalidModification(message, settable=settable)
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
    extra = {"context": context} if "context" in wanted else {}
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
    raise InvalidModification(
        f"there is no modifier {name[:80]!r}{_did_you_mean(name, listed)};"
        f" there is: {_listed(listed)}",
        modifiers=listed,
    )


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

    Without a seed, and with -1, it takes a random one. `cfg_scale` is another name for `cfg`.
    """
    checkpoint = _default_checkpoint(context) if ckpt_name is None else ckpt_name
    return {
        "3": _node(
            "KSampler",
            seed=RANDOM_INT if seed in (None, -1) else seed,
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
