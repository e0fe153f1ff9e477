#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["boto3>=1.36", "websocket-client>=1.8"]
# ///
"""ComfyUI PyWorker: turns a GPU box with ComfyUI into an HTTP API, in one file.

    POST /generate/sync   runs one ComfyUI workflow and answers when its outputs are delivered
    GET  /health          tells the platform whether the worker is in order
    GET  /ping            tells a load balancer the same by its status alone
    GET  /metrics         tells Prometheus what it has done

What was asked is read once into a frozen `Request`. A `Job` carries it: the files that its workflow
names are fetched, the job waits in the `GpuQueue`, ComfyUI runs the workflow, and its outputs are
delivered into the answer, into S3 and to a webhook. ComfyUI is spoken to over HTTP. One websocket,
kept for the worker's life and always drained, tells when a prompt ends. ComfyUI's history is
authoritative: the websocket only says when to look. When the websocket's connection is lost,
ComfyUI's history and queue are polled until the prompt has ended. A prompt that ComfyUI has lost is
submitted once more. A job whose history or cached files are gone is run again; it has MAX_RUNS.

Each HTTP connection has a thread. The GpuQueue keeps submit-to-finished to one job at a time;
everything else (checking, fetching, uploading, webhooks) runs outside it.

Chapters stand bottom-up, each uses only those above it: settings, errors, request and job,
addresses and inputs, ComfyUI, delivery, worker, HTTP, command line. To follow a request, begin at
`Handler._generate` (`_handle` and `_route` let it in), then `read_request`; in `Worker`: `process`,
`_prepare`, `_run_with_retries`, `_run_once` (which calls `PromptRunner.run` and `deliver`) and
`end`, whose webhook `deliver_webhook` sends.

MIT licence.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import http.server
import io
import json
import logging
import math
import mimetypes
import os
import random
import re
import reprlib
import select
import shutil
import socket
import socketserver
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from email import message_from_string
from functools import lru_cache, partial
from heapq import heappop, heappush
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from ipaddress import IPv4Address, ip_address, ip_network
from itertools import count
from operator import itemgetter
from queue import Empty, Full, Queue, SimpleQueue
from signal import SIGINT, SIGTERM, signal
from threading import Condition, Event, Lock, Thread, Timer
from time import monotonic
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlencode, urljoin, urlsplit
from uuid import uuid4

try:
    import websocket
except ImportError:
    sys.exit(
        "WORKER_ERROR: the package websocket-client is missing;"
        " install it with: pip install websocket-client"
    )

__version__ = "1.0.0"
COST = 100  # of each request: the static figure that an autoscaler is given

log = logging.getLogger("pyworker")

JsonObject = dict[str, Any]
Graph = dict[str, JsonObject]  # ComfyUI's API format: node id -> {"class_type": …, "inputs": …}
Answer = tuple[int, JsonObject]  # the HTTP status and the envelope
Output = JsonObject  # one entry of an answer's "output"


# What http.client and socket raise when a connection cannot be made, or breaks.
CONNECTION_LOST = (OSError, HTTPException)
CONNECTION_WORDS = {  # of those whose own words say little
    socket.gaierror: "its name cannot be resolved",
    ConnectionRefusedError: "it refuses the connection",
    TimeoutError: "it does not answer in time",
}

# No text is unbounded: what is longer is cut before it is searched, matched or formatted.
MAX_MESSAGE = 2000  # characters
MAX_QUOTE = 200  # characters of a value within a message
MAX_NAME = 200  # characters of a name that a request gives to a node or an input
MAX_FIELD = 4096  # characters of a text field, or of a choice among files
MAX_URL = 8192  # characters; the longest that servers commonly take
MAX_LOG_LINE = 3900  # characters, nearly all ASCII: with the … below 4,000 bytes


def cut(text: str, limit: int = MAX_MESSAGE) -> str:
    """The text, with … for what is beyond the limit (characters)."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


# An apostrophe may be a part of a URL, or the end of a quotation around it.
URL_PASSWORD = re.compile(r'(?i)(https?://)[^/?#\s"]*@')
URL_QUERY = re.compile(r'(?i)(https?://[^\s?"]*)(\?[^\s"]*)')


def without_secrets(text: str) -> str:
    """The text, its URLs without passwords and queries: these may hold a token or a signature."""
    return URL_QUERY.sub(_cut_query, URL_PASSWORD.sub(r"\1", text))


def _cut_query(found: re.Match[str]) -> str:
    query = found[2]
    return found[1] + query[len(query.rstrip("'),.;:")) :]


def show_text(text: str) -> str:
    """A text, cut to what a message quotes of it, without the secrets of URLs."""
    return cut(without_secrets(cut(text)), MAX_QUOTE)


def show(value: Any) -> str:
    """A value, as a message quotes it."""
    return repr(show_text(value)) if isinstance(value, str) else reprlib.repr(value)


def describe_error(error: Exception) -> str:
    """What went wrong with a connection, without numbers such as [Errno -2]."""
    for kind, words in CONNECTION_WORDS.items():
        if isinstance(error, kind):
            return words
    return re.sub(r"^\[[^]]*\] ", "", cut(str(error)))


# Settings #########################################################################################

Reader = Callable[[Any], Any]  # returns what a value stands for, or raises ValueError

BLANK: tuple[Any, ...] = ("", {}, None)  # what templates leave in a field that is not filled in


def reader(
    expected: str, is_valid: Callable[[Any], Any], describe: Callable[[Any], str] = lambda _: ""
) -> Reader:
    """Makes a reader that returns valid values unchanged; `expected` says what is valid."""

    def read(value: Any) -> Any:
        if not is_valid(value):
            raise ValueError(f"has to be {expected}{describe(value)}")
        return value

    return read


def number_reader(low: float, high: float, *types: type) -> Reader:
    """Makes a reader of numbers from low to high. A bool is refused, although it is an int."""
    return reader(
        f"a {'number' if float in types else 'whole number'} from {low:g} to {high}",
        lambda value: type(value) in types and low <= value <= high,
        lambda value: f", not {show(value)}",
    )


def pattern_reader(pattern: str, expected: str) -> Reader:
    """Makes a reader of strings that match the pattern as a whole."""
    return reader(
        expected,
        lambda value: isinstance(value, str) and re.fullmatch(pattern, value),
    )


def read_fields(given: JsonObject, readers: Mapping[str, Reader], prefix: str = "") -> JsonObject:
    """What the readers return for the fields that are given; blank fields count as absent.

    Raises ValueError with the name of the field at fault, after the prefix.
    """
    values = {}
    for name, read in readers.items():
        if given.get(name) in BLANK:
            continue
        try:
            values[name] = read(given[name])
        except ValueError as error:
            raise ValueError(f"{prefix}{name} {error}") from None
    return values


def is_url(value: Any) -> bool:
    """Whether it is an http(s) URL that http.client takes: plain ASCII, without spaces."""
    if not isinstance(value, str) or len(value) > MAX_URL or not re.fullmatch(r"[!-~]+", value):
        return False
    try:
        parts = urlsplit(value)
        host = (parts.hostname or "").encode("idna")
        port = parts.port
    except ValueError:  # a port or a host that is none, or a bracket without its twin
        return False
    # A % begins an IPv6 address' zone, which libraries read in different ways.
    if not host or port == 0 or re.search("[@%]", parts.netloc):
        return False
    return parts.scheme in ("http", "https")


def read_signing_key(secret: Any) -> bytes:
    """The bytes of a Standard Webhooks secret."""
    key = b""
    if isinstance(secret, str) and secret.startswith("whsec_"):
        with suppress(ValueError):  # no base64: refused below
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    if not key:
        raise ValueError(
            "has to be 'whsec_' and base64, as the Standard Webhooks specification has it"
        )
    return key


URL_EXPECTED = (
    "an http:// or https:// URL in plain ASCII (a space is %20), without a password,"
    " such as https://example.com/path"
)
read_text = reader(
    f"a string of at most {MAX_FIELD} characters",
    lambda value: isinstance(value, str) and len(value) <= MAX_FIELD,
)
read_plain = pattern_reader(
    f"[!-~]{{1,{MAX_FIELD}}}",
    f"a string in plain ASCII, without spaces, of at most {MAX_FIELD} characters",
)
read_flag = reader("true or false", lambda value: isinstance(value, bool))
read_object = reader("an object", lambda value: isinstance(value, dict))
read_url = reader(URL_EXPECTED, is_url)
read_count = number_reader(0, 2**53, int)  # JSON's numbers are exact up to here
read_seconds = number_reader(0, 10**7, int, float)  # 115 days: threads cannot wait much longer
read_timeout = number_reader(0.001, 3600, int, float)
read_pauses = pattern_reader(
    r"[0-9]{1,5}(\.[0-9]+)?(,[0-9]{1,5}(\.[0-9]+)?)*", "seconds with commas between, such as 4,20"
)


def _setting(read: Reader, help: str, default: Any = "") -> Any:
    return field(default=default, metadata={"read": read, "help": help})


@dataclass(frozen=True, repr=False)  # it holds secrets, which a repr would show
class Settings:
    """The environment, read once. A field's variable is its name in upper case.

    Durations are in seconds.
    """

    worker_host: str = _setting(read_text, "address to listen on", "127.0.0.1")
    port: int = _setting(number_reader(0, 65535, int), "port to listen on", 8000)
    port_health: int = _setting(
        number_reader(0, 65535, int), "a second port, for platforms that probe one; 0: none", 0
    )
    auth_token: str = _setting(
        read_plain, "what clients have to send as 'Authorization: Bearer <token>'"
    )
    allow_private_addresses: bool = _setting(
        read_flag, "let URLs in requests lead to private addresses", False
    )
    include_comfyui_response: bool = _setting(
        read_flag, "put ComfyUI's history entry into every answer", False
    )
    event_keep_alive: float = _setting(
        read_timeout, "seconds between the comments that keep an event stream open", 15.0
    )
    shutdown_grace: float = _setting(
        read_seconds, "seconds that SIGTERM leaves a running job and webhooks", 300.0
    )
    comfyui_api_base: str = _setting(read_url, "where ComfyUI answers", "http://127.0.0.1:8188")
    comfyui_install_path: str = _setting(
        read_text, "ComfyUI's folder; set, an answer shows each file's local_path"
    )
    comfyui_return_timeout: float = _setting(
        read_seconds, "seconds that ComfyUI may stay away under a job", 120.0
    )
    comfyui_silence_timeout: float = _setting(
        read_timeout,
        "seconds without a word from ComfyUI until it is asked, and that it has to answer",
        10.0,
    )
    comfyui_stuck_timeout: float = _setting(
        read_seconds,
        "seconds that ComfyUI may take to begin its next prompt, or to end an interrupted one",
        180.0,
    )
    unreachable_after: float = _setting(
        read_seconds, "seconds of failures until /health says unreachable", 10.0
    )
    prompt_head_start: float = _setting(
        read_seconds,
        "longest wait for the next prompt to be posted before a job's history is read",
        0.02,
    )
    comfy_org_api_key: str = _setting(read_plain, "passed on to ComfyUI for its partner nodes")
    max_queue_size: int = _setting(
        read_count, "jobs that may wait for the GPU; the next one gets 503", 100
    )
    max_body_bytes: int = _setting(read_count, "largest request body", 64 << 20)
    max_input_bytes: int = _setting(
        read_count, "largest file that a workflow may name by its URL", 100 << 20
    )
    output_base64_max_bytes: int = _setting(
        read_count, "largest file that an answer carries as base64", 64 << 20
    )
    job_timeout: float = _setting(
        read_seconds, "seconds that a job may take on the GPU; 0: no limit", 0.0
    )
    s3_access_key_id: str = _setting(
        read_plain, "S3 key; with neither key set, boto3's own chain is used"
    )
    s3_secret_access_key: str = _setting(read_plain, "its secret")
    s3_session_token: str = _setting(read_plain, "their token, if they are temporary")
    s3_bucket_name: str = _setting(read_plain, "bucket; naming one turns S3 on")
    s3_endpoint_url: str = _setting(read_url, "S3 server; empty: AWS")
    s3_region: str = _setting(read_plain, "its region")
    s3_prefix: str = _setting(read_text, "put before every S3 key")
    s3_connect_timeout: float = _setting(
        read_timeout, "seconds until S3 counts as failed, while connecting or reading", 60.0
    )
    s3_connect_attempts: int = _setting(
        number_reader(1, 1000, int), "tries of each S3 request, the first one included", 3
    )
    s3_url_expires: int = _setting(
        number_reader(1, 604800, int), "seconds that a presigned URL is valid", 604800
    )
    s3_public_url: str = _setting(read_url, "where the bucket is public; empty: URLs are presigned")
    webhook_url: str = _setting(read_url, "gets a POST when a job that was queued ends")
    webhook_timeout: float = _setting(
        read_timeout, "seconds until a webhook's receiver counts as silent", 30.0
    )
    webhook_retry_pauses: str = _setting(
        read_pauses, "seconds between a webhook's tries, 20 % more or less", "4,20,100,480"
    )
    webhook_secret: bytes = _setting(
        read_signing_key, "signs what goes to WEBHOOK_URL: whsec_ and base64", b""
    )
    workflow_file: str = _setting(read_text, "the workflow of RawWorkflow, in API format")
    workflows_dir: str = _setting(
        read_text, "folder of workflows; each is a modifier under its file's name"
    )
    default_checkpoint: str = _setting(
        read_text, "Text2Image's checkpoint; empty: the first that ComfyUI lists"
    )

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Reads the environment; ValueError names the variable at fault, never a secret's value."""
        given, readers = {}, {}
        for each in fields(cls):
            variable = each.name.upper()
            given[variable] = _parse_variable(environ.get(variable, "").strip(), each.default)
            readers[variable] = each.metadata["read"]
        values = read_fields(given, readers)
        settings = {variable.lower(): value for variable, value in values.items()}
        if not are_keys_paired(settings):
            raise ValueError(
                "S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY come in pairs: set both or neither;"
                " S3_SESSION_TOKEN needs both"
            )
        return cls(**settings)


S3_KEYS = ("s3_access_key_id", "s3_secret_access_key", "s3_session_token")


def are_keys_paired(given: Container[str]) -> bool:
    """Whether both S3 keys are among the settings that are given, or neither they nor a token."""
    found = [name in given for name in S3_KEYS]
    return all(found[:2]) or not any(found)


def _parse_variable(text: str, default: Any) -> Any:
    """The number or truth value that the text stands for, where the default is one."""
    if not isinstance(default, (int, float)):
        return text
    try:
        return json.loads(text.lower())
    except ValueError:
        return text  # which the setting's reader refuses


SETTING_READERS = {each.name: each.metadata["read"] for each in fields(Settings)}
SETTING_GROUPS = {  # by the first setting of each
    "worker_host": "Worker",
    "comfyui_api_base": "ComfyUI",
    "max_queue_size": "Limits",
    "s3_access_key_id": "S3",
    "webhook_url": "Webhooks",
    "workflow_file": "Workflows",
}


# Errors ###########################################################################################


class JobError(Exception):
    """A job's failure, raised where it is known and answered in one place.

    status: of HTTP. type: one of the contract's, for programs. message: one sentence that a person
    can act on; it is cut to MAX_MESSAGE, without the secrets of URLs. details: what else goes into
    the answer's `error`.
    """

    def __init__(self, status: int, type: str, message: str, **details: Any) -> None:
        self.status = status
        self.type = type
        self.message = without_secrets(cut(message))
        super().__init__(self.message)
        self.details = details

    @property
    def envelope_status(self) -> str:
        """The `status` of the answer."""
        return self.type if self.type in ("timeout", "cancelled") else "failed"


def bad_request(message: str, type: str = "invalid_request", **details: Any) -> JobError:
    """The error of a request that is not in order."""
    return JobError(400, type, message, **details)


def unavailable(state: str, comfyui: str = "") -> JobError:
    """The error of a job that cannot begin while the worker is in that state.

    comfyui: what `ComfyUIApi.name` calls it.
    """
    if state == "stopping":
        return JobError(
            503,
            "shutting_down",
            "the worker is stopping; send the job again, to another one or later",
        )
    reason = {
        "starting": "is not up yet: start it, or correct the address",
        "faulted": "has lost its GPU, or runs no prompts, and has to be restarted",
    }.get(state, "does not answer: start it, or correct the address")
    return JobError(503, "comfyui_unavailable", f"{comfyui} {reason}; try again later")


def start_thread(name: str, action: Callable[..., None], *args: Any) -> None:
    """Starts a daemon thread, which does not keep the process from ending; 503 if there is none."""
    with no_threads_as_503():
        Thread(target=action, args=args, name=name, daemon=True).start()


@contextmanager
def no_threads_as_503() -> Iterator[None]:
    """Turns the error of a thread that cannot be started into a JobError."""
    try:
        yield
    except RuntimeError:
        raise JobError(
            503, "queue_full", "the system has no more threads for it; try again later"
        ) from None


# Request and job ##################################################################################

RANDOM_INT = "__RANDOM_INT__"
# Graphs have some thousands of values; 64 MiB of "[],[],[]" would take 3 GB and half a minute.
MAX_JSON_VALUES = 10**6
# ComfyUI's own graphs nest 5 deep; deeper ones only serve to exhaust the stack.
MAX_JSON_DEPTH = 100
NEAR_CHARACTERS = 20  # before and behind what is no JSON that a message quotes
MAX_HISTORY_DEPTH = 150  # ComfyUI's entry for a prompt has the request's graph in it
MAX_WARNINGS = 20  # of one kind
FIELD_HINTS = {  # by what ComfyUI and other workers call a field
    "prompt": "workflow_json, or prompt within modifications",
    "images": "an input of a node, as a URL or a data: URI",
}
EVENT_STREAM = "text/event-stream"
JSON = "application/json"
OCTET_STREAM = "application/octet-stream"
CONVERTED_TYPES = ("image/webp", "image/jpeg")  # that a PNG may be asked for as
SAME_TYPES = {  # what some say -> what most systems' tables of types have
    "image/jpg": "image/jpeg",
    "audio/wav": "audio/x-wav",
    "audio/wave": "audio/x-wav",
    "audio/vnd.wave": "audio/x-wav",
    "audio/mp3": "audio/mpeg",
    "audio/flac": "audio/x-flac",
    "audio/m4a": "audio/mp4",
    "audio/x-m4a": "audio/mp4",
}
TIMINGS = ("queue_ms", "preprocess_ms", "generation_ms", "postprocess_ms")


def parse_body(body: bytes) -> JsonObject:
    """The object with "input" in it, out of a serverless envelope's "payload"; 400 otherwise."""
    if not body.strip():
        raise bad_request('the body is empty; send JSON: {"input": {"workflow_json": {...}}}')
    if sum(body.count(each) for each in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        raise bad_request(f"the body has more than {MAX_JSON_VALUES} values")
    try:
        value = json.loads(body, parse_constant=_parse_finite, parse_float=_parse_finite)
        _check_json(value, MAX_JSON_DEPTH)
    except json.JSONDecodeError as error:
        near = show(error.doc[max(0, error.pos - NEAR_CHARACTERS) : error.pos + NEAR_CHARACTERS])
        raise bad_request(f"the body is not JSON: {error}; it is near {near}") from None
    except (ValueError, RecursionError) as error:  # Unicode's errors are ValueErrors
        raise bad_request(f"the body is not JSON that can be read: {error}") from None
    if isinstance(value, dict) and isinstance(value.get("payload"), dict):
        value = value["payload"]
    if not isinstance(value, dict) or not isinstance(value.get("input"), dict):
        raise bad_request(
            'the body has to be a JSON object with the job in "input":'
            ' {"input": {"workflow_json": {...}}}'
        )
    return value


def _check_json(value: Any, max_depth: int) -> None:
    """Raises UnicodeError for what no answer could repeat, and RecursionError for deep values."""
    if not max_depth:
        raise RecursionError(f"it is nested more than {MAX_JSON_DEPTH} deep")
    if isinstance(value, str):
        value.encode()  # halves of surrogate pairs cannot be encoded
    if isinstance(value, (dict, list)):
        for each in value:
            _check_json(each, max_depth - 1)
    if isinstance(value, dict):
        for each in value.values():
            _check_json(each, max_depth - 1)


def _parse_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is no number that JSON has")
    return number


def map_strings(
    value: Any, change: Callable[[str], Any], max_depth: int = 2 * MAX_JSON_DEPTH
) -> Any:
    """A copy of the JSON value, each string in it changed; RecursionError if it nests deeper."""
    if not max_depth:
        raise RecursionError(f"it is nested more than {MAX_JSON_DEPTH} deep")
    if isinstance(value, dict):
        return {name: map_strings(each, change, max_depth - 1) for name, each in value.items()}
    if isinstance(value, list):
        return [map_strings(each, change, max_depth - 1) for each in value]
    return change(value) if isinstance(value, str) else value


def fill_random_ints(value: Any) -> Any:
    """A copy of the value with fresh integers in 0 … 2³²-1 in place of __RANDOM_INT__.

    A string that is nothing else becomes an integer; within a longer string it becomes text.
    """

    def fill(text: str) -> str | int:
        if text == RANDOM_INT:
            return random.getrandbits(32)
        return re.sub(RANDOM_INT, lambda _: str(random.getrandbits(32)), text)

    return map_strings(value, fill)


def read_graph(graph: Any) -> Graph:
    """A copy of the graph, random numbers filled in. ComfyUI answers some malformed ones with 500.

    Raises ValueError, and JobError (editor_format) for the editor's own format.
    """
    if not isinstance(graph, dict):
        raise ValueError("has to be an object of nodes in ComfyUI's API format, and no text")
    if isinstance(graph.get("nodes"), list):
        raise bad_request(
            "the workflow is in the editor's own format;"
            " in ComfyUI, use Workflow > Export (API) and send that",
            "editor_format",
        )
    for node_id, node in graph.items():
        _check_node(node_id, node)
    return {node_id: fill_random_ints(node) for node_id, node in graph.items()}


def _check_node(node_id: str, node: Any) -> None:
    class_type = node.get("class_type") if isinstance(node, dict) else None
    if not isinstance(class_type, str) or not class_type:
        body_hint = "; of a body for ComfyUI's /prompt, send what is in its prompt"
        hint = body_hint if node_id == "prompt" else ""
        raise ValueError(
            f"is not in API format: node {show(node_id)} has to have a class_type (a string){hint}"
        )
    inputs = node.get("inputs")
    if not isinstance(inputs, dict):
        raise ValueError(
            f"is not in API format: node {show(node_id)} has to have inputs (an object)"
        )
    for name in (node_id, class_type, *inputs):
        if len(name) > MAX_NAME:
            raise ValueError(f"has a name of more than {MAX_NAME} characters: {show(name)}")


def read_modifications(value: Any) -> JsonObject:
    """A copy of the object, random numbers filled in."""
    return dict(fill_random_ints(read_object(value)))


def read_accept(value: Any) -> str:
    """The first range of an Accept header that the worker can answer with, weights ignored.

    JSON's, where there is none.
    """
    for each in read_text(value).lower().split(","):
        media_range = each.partition(";")[0].strip()
        if media_range in ("*/*", JSON):
            break
        is_media = re.fullmatch(r"(image|video|audio|model|text)/([\w.+-]+|\*)", media_range)
        if is_media or media_range == OCTET_STREAM:
            return str(SAME_TYPES.get(media_range, media_range))
    return JSON


def _field(read: Reader, **default: Any) -> Any:
    return field(metadata={"read": read}, **default)


@dataclass(frozen=True, repr=False)  # it holds secrets, which a repr would show
class Request:
    """What was asked, checked once and never changed.

    The fields with a reader are those of the request's `input`, under the same names. Once the
    workflow is built, the job drops what it was built from: data URIs in it may be large.
    """

    modifier: str = _field(read_text, default="")
    modifications: JsonObject = _field(read_modifications, default_factory=dict)
    workflow_json: Graph = _field(read_graph, default_factory=dict)
    return_outputs_as_base64: bool = _field(read_flag, default=False)
    output_format: str = _field(pattern_reader("webp|jpeg", "webp or jpeg"), default="")
    output_quality: int = _field(number_reader(1, 100, int), default=90)
    accept: str = _field(read_accept, default=JSON)  # the media range to answer with
    prefer: str = _field(read_text, default="")
    extra_pnginfo: JsonObject = _field(read_object, default_factory=dict)
    previews: bool = _field(read_flag, default=False)  # in an event stream
    extra_params: JsonObject = field(default_factory=dict)  # of the webhook
    settings: Settings = field(default_factory=Settings)  # the operator's, under the request's own
    overridden: frozenset[str] = frozenset()  # the names of settings that the request changed

    @property
    def is_async(self) -> bool:
        """Whether the answer is to come before the job has run (RFC 7240)."""
        preferences = [each.partition(";")[0].strip() for each in self.prefer.lower().split(",")]
        return "respond-async" in preferences

    @property
    def wants_events(self) -> bool:
        """Whether the answer is an event stream."""
        return self.accept == EVENT_STREAM and not self.is_async

    @property
    def wants_file(self) -> bool:
        """Whether the answer is the bytes of one output."""
        return self.accept not in (JSON, EVENT_STREAM) and not self.is_async

    def is_public_only(self, setting: str) -> bool:
        """Whether that setting, a URL, is the request's and may not lead to a private address."""
        return setting in self.overridden and not self.settings.allow_private_addresses


SECRET_IGNORED = "webhook.secret was ignored: it is for a webhook.url of its own"
MAX_WEBHOOK_SECONDS = 300  # that a request may let its receiver take
ID_READERS = {
    # It becomes a part of an S3 key.
    "request_id": pattern_reader(
        r"(?!\.)[A-Za-z0-9._-]{1,128}",
        "a string of 1 to 128 characters out of A-Z a-z 0-9 . _ - and not start with a dot",
    ),
}
REQUEST_READERS = {
    each.name: each.metadata["read"] for each in fields(Request) if "read" in each.metadata
}
# Fields that override a setting. A setting that does not exist is a KeyError here.
OVERRIDE_READERS = {"comfy_org_api_key": SETTING_READERS["comfy_org_api_key"]}
GROUPS = {
    "s3": {
        **{
            name.removeprefix("s3_"): SETTING_READERS[name]
            for name in (*S3_KEYS, "s3_endpoint_url", "s3_region")
        },
        # An ARN in a bucket's place would choose another endpoint.
        "bucket_name": pattern_reader(
            r"[A-Za-z0-9._-]{3,255}", "the name of a bucket, 3 to 255 of A-Z a-z 0-9 . _ -"
        ),
    },
    "webhook": {
        **{name: SETTING_READERS[f"webhook_{name}"] for name in ("url", "secret")},
        "timeout": number_reader(0.001, MAX_WEBHOOK_SECONDS, int, float),
        "extra_params": read_object,
    },
}
INPUT_FIELDS = {*ID_READERS, *REQUEST_READERS, *OVERRIDE_READERS, *GROUPS}


class Notice(NamedTuple):
    """Something that a waiting or running job has to know; most are ComfyUI's, with its data."""

    type: str
    data: JsonObject = {}  # noqa: RUF012  # never changed


SILENCE = Notice("silence")  # no notice came for as long as the job waited
TURN = Notice("turn")  # the job is the first in the queue
MOVED = Notice("moved")  # the queue has moved
ABORT = Notice("abort")  # the job has to end


@dataclass(repr=False, eq=False)
class Job:
    """What becomes of a request on its way to its answer."""

    id: str | None = None  # the request's; None while its body is not read
    is_id_given: bool = False  # by the client, who may use it twice
    request: Request = field(default_factory=Request)
    connection: socket.socket | None = None  # the client's
    on_event: Callable[[str, JsonObject], None] | None = None  # takes an event's name and data
    on_accepted: Callable[[], None] | None = None  # called when the job has its place in the queue
    received_at: float = field(default_factory=time.time)
    timings: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TIMINGS, 0.0))
    warnings: list[str] = field(default_factory=list)
    workflow: Graph = field(default_factory=dict)  # as it is run; empty until it is built
    prompt_id: str = field(default_factory=lambda: str(uuid4()))
    inbox: SimpleQueue[Notice] = field(default_factory=SimpleQueue)
    abort_error: JobError | None = None
    was_queued: bool = False  # it had a place in the GpuQueue, so its webhook is owed
    has_turn: bool = False  # on the GPU
    is_posted: bool = False  # ComfyUI is known to have its prompt, or to have had it
    # Set once the prompt was posted, or the job has left the queue.
    submitted: Event = field(default_factory=Event)
    deadline: float = math.inf  # by monotonic(): JOB_TIMEOUT after its prompt began
    stuck_at: float = math.inf  # by monotonic(): when its prompt has to have begun
    node_states: JsonObject = field(default_factory=dict)  # ComfyUI's newest, if not yet reported
    percent: float = 0.0  # the highest progress that was reported
    history: JsonObject = field(default_factory=dict)  # ComfyUI's entry for the prompt
    outputs: list[Output] = field(default_factory=list)
    fetched: float = 0.0  # by monotonic(): until when its input files have come fast enough
    input_bytes: int = 0  # of its input files, until now
    animated: frozenset[str] = frozenset()  # the names of images that move
    embedded_bytes: int = 0  # of its files that the answer carries as base64
    answer_file: Output | None = None  # the output whose bytes are the answer
    answer_conversion: str = ""  # see conversion_of

    @property
    def settings(self) -> Settings:
        """The operator's settings, under those of the request."""
        return self.request.settings

    @property
    def wants_previews(self) -> bool:
        """Whether somebody listens to what the sampler shows of the picture as it grows."""
        return self.request.previews and self.on_event is not None

    @property
    def files(self) -> list[Output]:
        """The outputs that are files."""
        return [output for output in self.outputs if "filename" in output]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the milliseconds that the block takes to the timing of that name."""
        start = monotonic()
        try:
            yield
        finally:
            self.timings[name] += (monotonic() - start) * 1000

    def notify(self, event: str, **data: Any) -> None:
        """Tells the client that listens, if one does, what becomes of the job."""
        if self.on_event:
            self.on_event(event, data)

    def abort(self, error: JobError) -> None:
        """Ends a waiting or running job with that error; `PromptRunner.run` interrupts its prompt.

        HangUpWatcher, GpuQueue.close and Worker.stop call it. What is cancelled in ComfyUI itself
        is seen by `_check_told` (deleted) and `raise_if_failed` (interrupted).
        """
        self.abort_error = error
        self.inbox.put(ABORT)

    def next_notice(self, seconds: float | None = None) -> Notice:
        """The next notice; SILENCE if none comes in that time; raises the error of `abort`."""
        try:
            notice = self.inbox.get(timeout=seconds)
        except Empty:
            return SILENCE
        if notice is ABORT and self.abort_error:
            raise self.abort_error
        return notice


@contextmanager
def every_error_as(make_error: Callable[[Exception], Exception]) -> Iterator[None]:
    """Raises what `make_error` makes of any error in the block that is no JobError."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:  # of bugs, and of libraries that do not say all that they raise
        raise make_error(error) from None


def bug(job: Job, error: Exception) -> JobError:
    """The 500 internal_error of a bug that a job has met, which is logged.

    It must not cost the client its answer, nor the webhook its message.
    """
    whose = f"job {job.id}" if job.id else "a request"
    log.error("%s met a bug of the worker", whose, exc_info=error)
    return JobError(500, "internal_error", "the worker failed; its log says why")


def read_request(job: Job, body: JsonObject, headers: dict[str, str], settings: Settings) -> None:
    """Sets the job's id and request, request over headers, over the operator's settings.

    body: {"input": {…}}. headers: "accept" and "prefer". Raises JobError where a rule is broken;
    the id is set by then, most warnings only if each field could be read.
    """
    job.id = str(uuid4())
    given = body["input"]
    unknown = _unknown(given, INPUT_FIELDS)
    try:
        ids = read_fields(given, ID_READERS)
        job.id, job.is_id_given = ids.get("request_id", job.id), bool(ids)
        own = read_fields(given, OVERRIDE_READERS)
        for group, readers in GROUPS.items():
            inner = read_fields(given, {group: read_object}).get(group, {})
            unknown += _unknown(inner, readers, f"{group}.")
            if group == "webhook" and inner.get("url") in BLANK:
                inner = _without_url(job, inner, settings)
            for name, value in read_fields(inner, readers, f"{group}.").items():
                own[f"{group}_{name}"] = value
        values = read_fields(headers, REQUEST_READERS) | read_fields(given, REQUEST_READERS)
    except ValueError as error:
        raise bad_request(str(error)) from None
    misplaced = [f"{name}, beside input," for name in body if name in INPUT_FIELDS]
    for name in [*unknown, *misplaced][:MAX_WARNINGS]:
        job.warnings.append(f"{name} is no field of a request; it was ignored")
    _check_source(values, unknown)
    extra_params = own.pop("webhook_extra_params", {})
    settings, overridden = _override(job, settings, own)
    values.setdefault("return_outputs_as_base64", not settings.s3_bucket_name)
    job.request = Request(
        extra_params=extra_params, settings=settings, overridden=overridden, **values
    )
    job.workflow = job.request.workflow_json
    is_converted = job.request.output_format or job.request.accept in CONVERTED_TYPES
    if "output_quality" in values and not is_converted:
        job.warnings.append("output_quality does nothing without output_format; it was ignored")
    if job.request.is_async and not settings.webhook_url:
        raise bad_request(
            "Prefer: respond-async needs a webhook: give webhook.url, or set WEBHOOK_URL"
        )


def _without_url(job: Job, webhook: JsonObject, settings: Settings) -> JsonObject:
    """What counts of a webhook without a URL: its secret and time-out belong to one of its own."""
    given = [name for name, value in webhook.items() if value not in BLANK]
    if given and not settings.webhook_url:
        job.warnings.append("no webhook is sent: neither webhook.url nor WEBHOOK_URL is set")
    elif "secret" in given:
        job.warnings.append(SECRET_IGNORED)
    kept = ["extra_params"] if settings.webhook_url else []
    return {name: webhook.get(name) for name in kept}


def _unknown(given: JsonObject, known: Iterable[str], prefix: str = "") -> list[str]:
    """The first of the fields that are not known, each with what it may stand for."""
    names = [name for name, value in given.items() if name not in known and value not in BLANK]
    described = []
    for name in names[:MAX_WARNINGS]:
        near = FIELD_HINTS.get(name) or "".join(get_close_matches(name[:50], known, 1))
        described.append(f"{prefix}{name:.50}" + (f" (did you mean {near}?)" if near else ""))
    return described


def _check_source(values: JsonObject, unknown: list[str]) -> None:
    """Raises the 400 unless the request names exactly one of modifier and workflow_json."""
    has_modifier, has_workflow = "modifier" in values, "workflow_json" in values
    if has_workflow and not has_modifier and "modifications" in values:
        raise bad_request(
            "modifications go with a modifier;"
            " with workflow_json, put the values into the workflow itself"
        )
    told = ", ".join(unknown[:5])
    if has_modifier == has_workflow:
        has = "both modifier and" if has_modifier else "neither modifier nor"
        raise bad_request(
            f"input has {has} workflow_json: give one of them"
            + (f"; unknown: {told}" if told else "")
        )
    # Without its modifications, the job would make another picture than the one that is wanted.
    if "modifications" not in values and "did you mean modifications?" in told:
        raise bad_request(f"unknown: {told}")


def _override(job: Job, settings: Settings, own: JsonObject) -> tuple[Settings, frozenset[str]]:
    """The settings with the request's own over them, and the names of those that it changed.

    Keys come in pairs, and the operator's secrets only go to the operator's servers.
    """
    changed = {name for name, value in own.items() if value != getattr(settings, name)}
    if not are_keys_paired(own):
        raise bad_request(
            "s3.access_key_id and s3.secret_access_key come in pairs: give both or neither;"
            " s3.session_token needs both"
        )
    if "s3_access_key_id" in own:
        own = {"s3_session_token": "", **own}
    if changed & {"s3_bucket_name", "s3_endpoint_url"}:
        own = {"s3_public_url": "", **own}
    if "webhook_url" in changed:
        own = {"webhook_secret": b"", **own}
    else:
        own.pop("webhook_timeout", None)  # the operator's receiver has the operator's
        if settings.webhook_secret and own.pop("webhook_secret", b""):
            job.warnings.append(SECRET_IGNORED)
    result = replace(settings, **own)
    if any(name.startswith("s3_") for name in own) and not result.s3_bucket_name:
        raise bad_request("s3 needs a bucket: give s3.bucket_name, or set S3_BUCKET_NAME")
    if "s3_endpoint_url" in changed and "s3_access_key_id" not in own:
        raise bad_request("s3.endpoint_url needs its own s3.access_key_id and s3.secret_access_key")
    if "s3_bucket_name" in changed and not result.s3_access_key_id:
        raise bad_request(
            "s3.bucket_name needs s3.access_key_id and s3.secret_access_key:"
            " this worker has no keys for it"
        )
    return result, frozenset(changed)


def seeds(graph: Graph) -> dict[str, int]:
    """Each node's literal seed, as it is run, by node id."""
    found: dict[str, int] = {}
    for node_id, node in graph.items():
        for name, value in node["inputs"].items():
            if is_seed(name) and isinstance(value, int):
                found.setdefault(node_id, value)
    return found


def is_seed(input_name: str) -> bool:
    """Whether the input is a seed, maybe one within a dynamic input, such as "model.seed"."""
    return input_name.rpartition(".")[2] in ("seed", "noise_seed")


# Addresses and inputs #############################################################################

CHUNK_BYTES = 1 << 16
# The longest stall of a read or write: ComfyUI lists huge model folders while it checks a graph.
HTTP_SECONDS = 60
IDLE_SECONDS = 30  # that a connection is kept unused; ComfyUI closes it after 75
MAX_REDIRECTS = 5
MAX_HEADS = 10  # of one answer
MAX_ADDRESSES = 4  # of one name that are tried, each for the whole time-out
PARALLEL_FILES = 4  # of one job
MAX_INPUT_FILES = 200  # of one job
MAX_LARGE_INPUTS = 10  # of the largest size that one job may have; or more that are smaller
SECONDS_PER_FILE = 2  # that a job gets for each of its files that is there
SLOWEST_SERVER = 1 << 16  # bytes a second that a file has to arrive with, or a webhook to be taken
# How an input begins that may name a file to fetch.
FILE_SOURCE = re.compile(r"(?i)https?://|data:")
# What the formats that ComfyUI loads begin with; a group's name is the extension.
MAGIC = re.compile(
    rb"(?P<png>\x89PNG)|(?P<jpg>\xff\xd8\xff)|(?P<gif>GIF8)|(?P<bmp>BM.{4}\0{4})"
    rb"|(?P<tiff>II\*\0|MM\0\*)|(?P<webp>RIFF.{4}WEBP)|(?P<wav>RIFF.{4}WAVE)|(?P<avi>RIFF.{4}AVI )"
    rb"|(?P<avif>.{4}ftypavi)|(?P<mov>.{4}ftypqt)|(?P<m4a>.{4}ftypM4A)|(?P<mp4>.{4}ftyp)"
    rb"|(?P<webm>\x1aE\xdf\xa3)|(?P<flac>fLaC)|(?P<ogg>OggS)|(?P<mp3>ID3|\xff[\xfb\xf3\xf2])"
    rb"|(?P<glb>glTF)",
    re.DOTALL,
)
# How the netpbm formats, pictures as text, do not begin.
TEXT = re.compile(rb"(?!P[1-6]\s)[\t\n\r -~]+")
V6_PUBLIC = ip_network("2000::/3")  # all that IANA has given out
V4_IN_V6 = [ip_network(each) for each in ("::ffff:0:0/96", "64:ff9b::/96")]
# Ranges that are not for everyone, although ipaddress calls them global.
SPECIAL_RANGES = [
    ip_network(each)
    for each in "192.0.0.0/24 192.88.99.0/24 224.0.0.0/4 2001::/23 2002::/16 3fff::/20".split()
]


def is_public(address: str) -> bool:
    """Whether the IP address is one of the public Internet."""
    ip = ip_address(address.partition("%")[0])
    if any(ip in each for each in V4_IN_V6):  # mapped IPv4, and NAT64
        return is_public(str(IPv4Address(int(ip) & 0xFFFFFFFF)))
    if not ip.is_global or any(ip in each for each in SPECIAL_RANGES):
        return False
    return ip.version == 4 or ip in V6_PUBLIC


def public_addresses(host: str, port: int) -> list[Any]:
    """The host's socket addresses; PermissionError where one of them is not public."""
    found = [each[4] for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        if not is_public(str(address[0])):
            raise PermissionError(
                f"{host} leads to a private address, and"
                " URLs in requests may lead to public addresses only"
                " (the operator can lift this with ALLOW_PRIVATE_ADDRESSES=true)"
            )
    return found


def check_public(name: str, url: str, must_resolve: bool) -> None:
    """400 where the URL leads to an address that is not public, or nowhere if it must resolve."""
    parts = urlsplit(url)
    try:
        public_addresses(parts.hostname or "", parts.port or 443)
    except (OSError, UnicodeError) as error:
        if isinstance(error, PermissionError) or must_resolve:
            raise bad_request(f"{name}: {describe_error(error)}") from None


def _connect_public(address: tuple[str, int], timeout: float, *_: Any) -> socket.socket:
    """As socket.create_connection, to the very address that was checked.

    A second look-up of the name could lead elsewhere.
    """
    for each in public_addresses(*address)[:MAX_ADDRESSES]:
        try:
            return socket.create_connection(each[:2], timeout)
        except OSError:
            continue  # the next address may answer
    raise ConnectionError(f"{address[0]} does not answer")


class CheckedResponse(HTTPResponse):
    """A response that notices when its body is cut short; http.client ends it in silence.

    It takes a few heads of status 100 before its own; http.client reads on for ever.
    """

    _heads = 0

    def _read_status(self) -> Any:
        self._heads += 1
        if self._heads > MAX_HEADS:
            raise HTTPException("it says 100 Continue again and again")
        return super()._read_status()  # type: ignore[misc]

    def read(self, amt: int | None = None) -> bytes:
        """At most `amt` bytes, or the rest; ConnectionError or IncompleteRead where it is cut."""
        chunk = super().read(amt)
        if amt is not None and len(chunk) < amt and self.length:
            raise ConnectionError(f"the answer ended {self.length} bytes early")
        return chunk

    def read1(self, n: int = -1) -> bytes:
        """As `read`, but returns what has arrived: a slow server is no reason to wait for more."""
        if self.length is None:
            return super().read1(n)
        chunk = self.fp.read1(min(n, self.length))  # Python 3.10 counts nothing here
        self.length -= len(chunk)
        if not chunk:
            self.read(1)  # closes what is complete; else it was cut
        return chunk


def connect(url: str, timeout: float, is_public_only: bool = False) -> HTTPConnection:
    """A connection to the URL's server, past any proxy of the environment; see CONNECTION_LOST."""
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port or kind.default_port, timeout=timeout)
    connection.response_class = CheckedResponse
    if is_public_only:  # TLS comes on top of it
        connection._create_connection = _connect_public  # type: ignore[attr-defined]
    connection.connect()
    return connection


class ConnectionPool:
    """Idle connections to one server: ComfyUI takes 0.2 ms to accept a new one."""

    def __init__(self) -> None:
        self._idle: list[tuple[float, HTTPConnection]] = []

    def take(self, timeout: float) -> HTTPConnection | None:
        """The connection that was used last; None where there is none, or it is too old."""
        try:
            used_at, connection = self._idle.pop()
        except IndexError:
            return None
        if not connection.sock or monotonic() - used_at > IDLE_SECONDS:
            return None
        connection.sock.settimeout(timeout)
        return connection

    def give_back(self, connection: HTTPConnection) -> None:
        """Keeps the connection for the next one who asks."""
        self._idle.append((monotonic(), connection))

    def clear(self) -> None:
        """Forgets all connections: their server has gone."""
        self._idle.clear()


@contextmanager
def http_exchange(
    url: str,
    timeout: float = HTTP_SECONDS,
    body: bytes | Iterable[bytes] | None = None,
    headers: Mapping[str, str] = {},
    pool: ConnectionPool | None = None,
    is_public_only: bool = False,
    total_timeout: float = 0,
) -> Iterator[HTTPResponse]:
    """The response to a GET, or to a POST where there is a body, whatever its status.

    body: JSON, or pieces of what the headers describe. timeout: seconds without a byte.
    total_timeout: seconds from the connection to the end of the answer's head; 0: no limit.
    Redirects are not followed. Raises CONNECTION_LOST.
    """
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"User-Agent": f"ComfyUI-PyWorker/{__version__}", **headers}
    if isinstance(body, bytes):
        headers |= {"Content-Type": JSON, "Content-Length": str(len(body))}
        body = io.BytesIO(body)  # sent in pieces: a time-out covers all that is sent at once
    connection = pool.take(timeout) if pool else None
    connection = connection or connect(url, timeout, is_public_only)
    with ExitStack() as stack:
        stack.callback(connection.close)
        with time_limit(connection.sock, total_timeout):
            connection.request("GET" if body is None else "POST", target, body, headers)
            response = connection.getresponse()
        yield response
        if pool and response.length == 0 and not response.will_close:
            pool.give_back(connection)
            stack.pop_all()  # it stays open


@contextmanager
def time_limit(connection: socket.socket | None, seconds: float) -> Iterator[None]:
    """Shuts the connection down if the block takes longer; 0: no limit."""
    if not connection or not seconds:
        yield
        return
    timer = Timer(seconds, _shut_down, (connection,))
    with no_threads_as_503():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):  # it has just been closed
        # Not TLS' own shutdown, which is no matter for another thread.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


BAD_BASE64 = "its base64 has other characters in it, or is cut short"


class DataUri:
    """The file within a data: URI, decoded in pieces: the whole may not fit into memory."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._at = uri.find(",") + 1  # what comes next
        head = uri[5 : min(self._at - 1, MAX_FIELD)]
        if not self._at or self._at > MAX_FIELD:
            raise ValueError("it is not like data:image/png;base64,iVBORw0…")
        self._is_base64 = head.lower().endswith(";base64")
        self._left = b""  # base64 that makes no whole bytes yet
        self.headers = message_from_string(f"Content-Type: {head}\n\n")

    def read1(self, n: int) -> bytes:
        """About n bytes; b"" at the end. Raises ValueError where it is not encoded as it says."""
        while self._at < len(self._uri):
            piece = self._uri[self._at : self._at + n]
            if "%" in piece[-2:]:  # the rest of it comes next
                piece = piece[: piece.rindex("%")] or piece
            self._at += len(piece)
            decoded = self._decode(unquote_to_bytes(piece))
            if decoded:
                return decoded
        if self._left:
            raise ValueError(BAD_BASE64)
        return b""

    def _decode(self, piece: bytes) -> bytes:
        if not self._is_base64:
            return piece
        data = self._left + b"".join(piece.split())
        whole = len(data) // 4 * 4
        self._left = data[whole:]
        try:
            return base64.b64decode(data[:whole], validate=True)
        except ValueError:
            raise ValueError(BAD_BASE64) from None


@contextmanager
def open_source(source: str, job: Job) -> Iterator[Any]:
    """The file behind an http(s) URL or a data: URI, with `read1` and `headers`.

    Raises CONNECTION_LOST, ValueError where there is no file, or the error of `job.abort`.
    """
    if source[:5].lower() == "data:":
        yield DataUri(source)
        return
    for _ in range(MAX_REDIRECTS + 1):
        if not is_url(source):
            raise ValueError(f"it is not {URL_EXPECTED}")
        check_pace(job)
        with http_exchange(
            source,
            is_public_only=not job.settings.allow_private_addresses,
            total_timeout=HTTP_SECONDS,
        ) as response:
            if response.status == 200:
                yield response
                return
            if response.status not in (301, 302, 303, 307, 308):
                raise ValueError(f"its server answered with {response.status}")
            source = urljoin(source, response.headers.get("Location", ""))
    raise ValueError("it redirects too often")


def check_source(where: str, choice: str, value: str) -> None:
    """400 for a text that is long, or looks like a URL, in an input that takes no such thing.

    choice: what the input chooses, see `ComfyUIApi.choice_of`.
    """
    is_source = FILE_SOURCE.match(value)
    if choice == "model" and is_source:
        raise bad_request(
            f"{where} is {show(value)}: models are installed in ComfyUI's models folder, not sent",
            "input_unavailable",
        )
    # ComfyUI would hold up everybody for half a minute to refuse 5 MB.
    if choice != "model" and not is_source:
        raise bad_request(
            f"{where} has {len(value)} characters, which is no file's name; put"
            " data:image/png;base64, (or the like) in front of base64",
            "input_unavailable",
        )


def download(job: Job, source: str, choice: str) -> tuple[BinaryIO, str]:
    """The file behind the source, on disk, and a name for it: its SHA-256 and an extension.

    choice: what it is to be, an 'image', a 'video', an 'audio' or any 'file'.

    Raises JobError: input_unavailable, also above MAX_INPUT_BYTES, internal_error where the disk
    is full, or the error of `job.abort`.
    """
    with disk_errors_as_500():
        file = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    shown = show_text(source).partition(",")[0]  # without the data of a data: URI
    try:
        with open_source(source, job) as opened:
            digest = _copy(opened, file, job)
            mimetype = opened.headers.get_content_type()
        if not file.tell():
            raise ValueError("it is empty")
        file.seek(0)
        head = file.read(MAX_QUOTE)
        # ComfyUI 0.33 would take a text for a video of one, and 1 MB of it for all its memory.
        is_text = TEXT.fullmatch(head) and not MAGIC.match(head)
        if mimetype == "text/html" or (choice != "file" and is_text):
            raise ValueError(f"it is no {choice}, but text: {show(head.decode(errors='replace'))}")
    except (*CONNECTION_LOST, ValueError) as error:
        if job.abort_error:  # while a server was silent
            raise job.abort_error from None
        raise bad_request(
            f"the input {shown} cannot be had: {describe_error(error)}", "input_unavailable"
        ) from None
    return file, digest + _extension(head, mimetype, shown)


def read_pieces(file: BinaryIO) -> Iterator[bytes]:
    """The file from its beginning, in pieces: the whole may not fit into memory."""
    file.seek(0)
    return iter(partial(file.read, CHUNK_BYTES), b"")


@contextmanager
def disk_errors_as_500() -> Iterator[None]:
    """Turns an error of the worker's disk, which is not the client's fault, into a JobError."""
    try:
        yield
    except OSError as error:
        raise JobError(
            500,
            "internal_error",
            f"the worker cannot store input files: {error.strerror}; free its temporary folder",
        ) from None


def _copy(opened: Any, file: BinaryIO, job: Job) -> str:
    """Copies what was opened into the file; returns its SHA-256."""
    digest, limit = hashlib.sha256(), job.settings.max_input_bytes
    while chunk := opened.read1(CHUNK_BYTES):
        digest.update(chunk)
        with disk_errors_as_500():
            file.write(chunk)
        check_pace(job, len(chunk) / SLOWEST_SERVER)
        job.input_bytes += len(chunk)
        if file.tell() > limit:
            raise ValueError(f"it has more than the {limit} bytes of MAX_INPUT_BYTES")
        if job.input_bytes > MAX_LARGE_INPUTS * limit:
            raise ValueError(
                f"the job's files have more than {MAX_LARGE_INPUTS} times MAX_INPUT_BYTES"
            )
    with disk_errors_as_500():
        file.flush()
    check_pace(job, SECONDS_PER_FILE)
    return digest.hexdigest()


def check_pace(job: Job, earned: float = 0) -> None:
    """Raises ValueError where servers keep a job from its files, or the error of `job.abort`.

    earned: the seconds that what has just come may have taken.
    """
    if job.abort_error:
        raise job.abort_error
    job.fetched = min(monotonic(), job.fetched + earned)
    if monotonic() - job.fetched > HTTP_SECONDS:
        raise ValueError("its server is too slow")


def _extension(head: bytes, mimetype: str, url: str) -> str:
    """The extension that the file's first bytes, its type or its URL tell, in this order."""
    if found := MAGIC.match(head):
        return f".{found.lastgroup}"
    known = mimetypes.guess_extension(mimetype) if mimetype != OCTET_STREAM else None
    return known or "".join(re.findall(r"(?a)\.\w{1,12}$", url))


# ComfyUI: what it says, in words ##################################################################

# What names a file to ComfyUI, and what it stands for where it is left out.
FILE_DEFAULTS = {"filename": "", "subfolder": "", "type": "output"}
# How a bare text in the history ends that may be a file's name.
MEDIA_EXTENSIONS = frozenset(
    """.png .jpg .jpeg .webp .gif .avif .exr .tif .tiff .svg .mp4 .webm .mkv .mov .wav .mp3 .flac
    .opus .ogg .m4a .glb .gltf .obj .fbx .stl .ply .splat .ksplat .spz .usdz .3mf .zip .latent
    .safetensors""".split()
)
HINTS = {  # by the type of ComfyUI's refusal
    "prompt_no_outputs": "; add an output node that saves, such as SaveImage, and connect it",
}
# Nodes that the editor resolves; its API export has none of them.
EDITOR_ONLY = ("Reroute", "Note", "MarkdownNote", "PrimitiveNode", "GetNode", "SetNode")
OUT_OF_MEMORY = re.compile(
    r"(?i)OutOfMemory|out of memory|allocate memory|allocation on device|_ALLOC_FAILED"
)
MAX_LISTED_ERRORS = 20
MAX_LISTED_CHOICES = 50
# The root of an absolute path: POSIX, Windows, its network, or as a URL.
_ROOT = r"(?:/(?!/)|file:|[A-Za-z]:(?=[\\/])|\\\\)"
# Within quotes, a path may have spaces in it.
PATH = re.compile(
    rf"""(?<='){_ROOT}[^'"]*(?=')|(?<="){_ROOT}[^'"]*(?=")|(?<![\w./-]){_ROOT}[^\s'"]*"""
)


def scrub(value: Any, own: Container[str] = (), max_depth: int = MAX_HISTORY_DEPTH) -> Any:
    """ComfyUI's words, fit for an answer: no tracebacks, absolute paths cut to the file's name.

    Each text is cut to MAX_MESSAGE before. own: the request's words, which come back as they are.
    RecursionError where it nests deeper than what can be searched and written later.
    """
    if not max_depth:
        raise RecursionError(f"it is nested more than {MAX_HISTORY_DEPTH} deep")
    if isinstance(value, dict):
        kept = {name: each for name, each in value.items() if name != "traceback"}
        return {scrub(name, own): scrub(each, own, max_depth - 1) for name, each in kept.items()}
    if isinstance(value, list):
        return [scrub(each, own, max_depth - 1) for each in value]
    if isinstance(value, str) and value not in own:
        return PATH.sub(partial(_cut_path, own), cut(value))
    return value


def _cut_path(own: Container[str], found: re.Match[str]) -> str:
    path = found[0]
    last_slash = max(path.rfind("/"), path.rfind("\\"))
    is_own = path in own or path.rstrip(",;:.)]") in own
    return path if is_own or last_slash < 2 else path[last_slash + 1 :]


def own_words(graph: Graph) -> frozenset[str]:
    """What the request itself has said, for `scrub`: the texts of its workflow."""
    values = (value for node in graph.values() for value in node["inputs"].values())
    return frozenset(each for each in values if isinstance(each, str) and len(each) <= MAX_MESSAGE)


@contextmanager
def bad_answer_as_502() -> Iterator[None]:
    """Turns what is raised over an answer of unknown shape into the 502 comfyui_error."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise unusable_answer(f"with something that makes no sense: {error!r}") from None


def unusable_answer(what: str) -> JobError:
    """The error of an answer of ComfyUI that no worker can use."""
    return JobError(
        502, "comfyui_error", f"ComfyUI answered {what}; is it ComfyUI, and what does its log say?"
    )


Choices = Callable[[str, str], list[str]]  # what there is to choose for a class' input, by its name


class Rejected(JobError):
    """What POST /prompt has said of a workflow that it refuses.

    It is put into words, which may take a while, by whoever does not have the GPU: see `rejection`.
    """

    def __init__(self, answer: Any) -> None:
        super().__init__(422, "workflow_rejected", "ComfyUI refuses the workflow")
        self.answer = answer


@bad_answer_as_502()
def rejection(
    answer: JsonObject, graph: Graph, choices: Choices, find_missing: Callable[[Graph], Graph]
) -> JobError:
    """The error of a workflow that POST /prompt refuses with this answer.

    find_missing: returns the nodes whose class ComfyUI has not.
    """
    answer = scrub(answer, own_words(graph))
    error, node_errors = answer["error"], answer.get("node_errors") or {}
    reason = describe_node_errors(node_errors, graph, choices)
    details = {}
    if error["type"] in ("missing_node_type", "invalid_prompt") and not reason:
        with suppress(*CONNECTION_LOST):  # ComfyUI's own words have to do
            missing = {each: node["class_type"] for each, node in find_missing(graph).items()}
            reason = describe_missing(missing)
            details["missing_nodes"] = missing
    if not reason:
        reason = f"{error['message']} {error.get('details', '')}".strip()
        reason += HINTS.get(error["type"], "")
    return JobError(
        422,
        "workflow_rejected",
        f"ComfyUI refuses the workflow: {reason}",
        node_errors=node_errors,
        **details,
    )


def describe_missing(missing: Mapping[str, str]) -> str:
    """What to do about nodes, {id: class}, whose class ComfyUI has not; empty where none is."""
    described = []
    for is_editors, lack, advice in (
        (False, "not installed", "check the spelling, or install the custom nodes that bring it"),
        (True, "only in the editor", "send what Workflow > Export (API) makes, which has none"),
    ):
        names = [
            f"{class_type} (node {node_id})"
            for node_id, class_type in missing.items()
            if (class_type in EDITOR_ONLY) == is_editors
        ]
        if names:
            described.append(f"{lack}: {', '.join(names[:MAX_LISTED_ERRORS])} ({advice})")
    return "; ".join(described)


def describe_node_errors(node_errors: JsonObject, graph: Graph, choices: Choices) -> str:
    """What is wrong with each node, from scrubbed errors; empty where nothing is."""
    errors = [
        (node_id, about["class_type"], error)
        for node_id, about in node_errors.items()
        for error in about["errors"]
    ]
    described = []
    for node_id, class_type, error in errors[:MAX_LISTED_ERRORS]:
        words = _describe_node_error(class_type, error, graph, choices)
        described.append(f"{class_type} (node {node_id}): {words}")
    left = len(errors) - MAX_LISTED_ERRORS
    more = f"; and {left} more" if left > 0 else ""
    return cut("; ".join(described)) + more


def _describe_node_error(class_type: str, error: JsonObject, graph: Graph, choices: Choices) -> str:
    details, kind = str(error.get("details", "")), error["type"]
    name = str((error.get("extra_info") or {}).get("input_name", ""))
    if kind == "value_not_in_list":
        try:
            return _describe_missing_choice(class_type, error["extra_info"], choices)
        except JobError:
            pass  # ComfyUI's own words, which leave longer lists out, have to do
    if re.search(r"Invalid \w+ file", details):
        where = "it has to lie in ComfyUI's input folder; or send its http(s):// URL, or its"
        return f"{cut(details, MAX_QUOTE)} ({where} base64 behind data:image/png;base64,)"
    linked = details.strip("'")
    if kind.startswith("exception_during") and " " not in details and linked not in graph:
        return f"it is linked to node {details}, which is not in the workflow"
    if kind.startswith("exception_during") and details == linked:
        return f"a link to node {linked} has to have its id in quotes"
    words = f"{error['message']}: {cut(details, 500)}".rstrip(": ")
    if kind == "value_smaller_than_min" and is_seed(name):
        words += f'; for a random one, send "{RANDOM_INT}"'
    return words


def _describe_missing_choice(class_type: str, extra: JsonObject, choices: Choices) -> str:
    name, value = extra["input_name"], extra.get("received_value")
    offered = choices(class_type, name)
    listed = ", ".join(offered[:MAX_LISTED_CHOICES]) or "none"
    if len(offered) > MAX_LISTED_CHOICES:
        listed += f" and {len(offered) - MAX_LISTED_CHOICES} more"
    is_file = isinstance(value, str) and re.search(r"\.\w{2,12}$", value)
    lack = "installed" if is_file else "a choice"
    return f"{name} {show(value)} is not {lack}; there is: {listed}"


@bad_answer_as_502()
def failure_messages(history: JsonObject) -> JsonObject | None:
    """What a history entry tells of a job that failed, by kind; None where it completed."""
    status = history.get("status") or {}
    return None if status.get("completed") else dict(status["messages"])


@bad_answer_as_502()
def raise_if_failed(history: JsonObject, graph: Graph) -> None:
    """Raises the JobError of a job that failed, as its history entry tells it."""
    messages = failure_messages(history)
    if messages is None:
        return
    if "execution_interrupted" in messages:
        raise JobError(499, "cancelled", "the job was interrupted in ComfyUI")
    error = messages["execution_error"]
    names = ("node_id", "node_type", "exception_type", "exception_message")
    own = own_words(graph)
    details = {name: scrub(cut(str(error.get(name, ""))).strip(), own) for name in names}
    details = {name: without_secrets(each) for name, each in details.items()}
    words = details["exception_message"]
    if not re.search(r"\s", words):  # an exception without words, or only with a name in it
        words = f"{details['exception_type']} {words}".strip()
    message = f"{details['node_type']} (node {details['node_id']}) failed: {words}"
    if OUT_OF_MEMORY.search(f"{details['exception_type']} {message}"):
        message += "; use a smaller picture, batch or model"
        raise JobError(500, "out_of_memory", message, **details)
    raise JobError(500, "execution_failed", message, **details)


@bad_answer_as_502()
def may_be_stale(history: JsonObject) -> bool:
    """Whether outputs may be cached ones whose files were deleted; a lost history cannot tell."""
    if not history:
        return True
    messages = history["status"]["messages"]
    return any(data.get("nodes") for kind, data in messages if kind == "execution_cached")


def is_still_image(output: Output, animated: Container[str]) -> bool:
    """Whether ComfyUI can convert the file as a whole: of an animation it takes the first frame."""
    extension = os.path.splitext(output["filename"])[1].lower()
    is_image = extension in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
    return output["output_type"] == "images" and is_image and output["filename"] not in animated


@bad_answer_as_502()
def find_animated(history: JsonObject) -> frozenset[str]:
    """The names of the images in a history entry that move."""
    return frozenset(
        str(item["filename"])
        for made in (history.get("outputs") or {}).values()
        if True in _as_list(made.get("animated"))
        for item in _as_list(made.get("images"))
        if isinstance(item, dict) and "filename" in item
    )


@bad_answer_as_502()
def read_outputs(history: JsonObject, graph: Graph) -> list[Output]:
    """Every file and value of a history entry, in the graph's order of nodes.

    A node that others expand into stands for what these have made. A string that may be a file's
    name, as the 3D nodes give it, has both "filename" and "value".
    """
    about = history.get("meta") or {}
    order = {node_id: place for place, node_id in enumerate(graph)}
    made = []
    for node_id, each in (history.get("outputs") or {}).items():
        shown = str(about.get(node_id, {}).get("display_node", node_id))
        made.append((order.get(shown, len(order)), shown, node_id, each))
    outputs = []
    for _, shown, _, each in sorted(made, key=itemgetter(0, 1, 2)):
        for output_type, items in each.items():
            outputs += _read_items(_as_list(items), {"node_id": shown, "output_type": output_type})
    return outputs


def _as_list(items: Any) -> list[Any]:
    return items if isinstance(items, list) else [items]


def _read_items(items: list[Any], origin: dict[str, str]) -> list[Output]:
    found, values = [], []
    for item in items:
        if isinstance(item, dict) and item.get("filename"):
            found.append(_read_file(item) | origin)
        elif isinstance(item, str) and origin["output_type"] != "text" and _may_be_file(item):
            found.append(_read_file({"filename": item}) | origin | {"value": [item]})
        elif item is not None and item != [] and not isinstance(item, bool):  # these are flags
            values.append(item)
    return [*found, {**origin, "value": values}] if values else found


def _may_be_file(text: str) -> bool:
    return len(text) < MAX_QUOTE and os.path.splitext(text)[1].lower() in MEDIA_EXTENSIONS


def _read_file(item: JsonObject) -> Output:
    file = {name: str(item.get(name) or default) for name, default in FILE_DEFAULTS.items()}
    name, _, kind = file["filename"].rpartition(" [")
    if kind in ("output]", "input]", "temp]"):  # a name that LoadImage would take
        file["filename"], file["type"] = name, kind[:-1]
    # Some give the whole path, and some a part of it with the name.
    path = os.path.join(file["subfolder"], file["filename"]).replace("\\", "/")
    if os.path.isabs(path):
        path = path.rpartition(f"/{file['type']}/")[2]
    file["subfolder"], _, file["filename"] = path.rpartition("/")
    if isinstance(item.get("metadata"), dict):  # of an asset: width, height, duration, fps
        file["metadata"] = scrub(item["metadata"])
    return file


# ComfyUI: whether it is in order ##################################################################


class Health:
    """The state of ComfyUI, from the events that listener, probes and jobs report.

    It is starting until the first connection, then ready. It is unreachable after a while of
    failures, and faulted while its GPU is broken or it runs no prompts: only a restart mends that.
    """

    def __init__(self, settings: Settings) -> None:
        self._unreachable_after = settings.unreachable_after
        self._return_timeout = settings.comfyui_return_timeout
        self._was_connected = False
        self._is_connected = False
        self._is_running = False
        self._failing_since = 0.0  # by monotonic(); 0: nothing fails
        self.fault = ""  # id of a prompt that ComfyUI knows for as long as it is broken

    def connected(self) -> None:
        """The websocket was connected."""
        self._was_connected = self._is_connected = True
        self._failing_since = 0.0

    def disconnected(self, was_silent: bool) -> None:
        """The websocket's connection was lost, or could not be made. was_silent: nothing came."""
        if self._is_connected and not was_silent:
            self._failing_since = 0.0  # what failed before was a probe that was slow
        self._is_connected = False
        self.failed()

    def answered(self) -> None:
        """ComfyUI has answered over HTTP."""
        if self._is_connected and not self.fault:
            self._failing_since = 0.0

    def heard(self) -> None:
        """ComfyUI has said something over the websocket: proof enough while a prompt runs."""
        if self._is_running:
            self.answered()

    def failed(self) -> float:
        """ComfyUI has not answered; returns since when (monotonic()) that has been so."""
        since = self._failing_since or monotonic()
        self._failing_since = since
        return since

    def broken(self, prompt_id: str) -> None:
        """With this prompt, ComfyUI has come into a state that only a restart clears."""
        self.fault = prompt_id
        self.failed()

    def mended(self) -> None:
        """ComfyUI runs anew, or goes on after all."""
        self.fault = ""

    def prompt_running(self, is_running: bool) -> None:
        """One of our prompts was begun, or has ended."""
        self._is_running = is_running

    @property
    def is_failing(self) -> bool:
        """Whether the last thing that was heard of ComfyUI is a failure."""
        return self._failing_since > 0

    @property
    def state(self) -> str:
        """'starting', 'ready', 'unreachable' or 'faulted', from what is known: nothing is asked."""
        if self.fault:
            return "faulted"
        if not self._was_connected:
            return "starting"
        is_proven = self._is_running and self._is_connected  # whatever probes say
        is_away = self._seconds_away() > self._unreachable_after
        return "unreachable" if is_away and not is_proven else "ready"

    @property
    def needs_restart(self) -> bool:
        """Whether it is broken, or has been away for longer than any job waits for it."""
        is_gone = self._was_connected and not self._is_connected
        return bool(self.fault) or (is_gone and self._seconds_away() > self._return_timeout)

    def _seconds_away(self) -> float:
        since = self._failing_since
        return monotonic() - since if since else 0.0


# ComfyUI: its HTTP API ############################################################################

PROBE_SECONDS = 0.8  # below the one second that Kubernetes grants a probe
PROBE_EVERY_SECONDS = 1
VIEW_TRIES = 2
MAX_ASKED_CLASSES = 200  # of one workflow
UPLOADS = ("image", "video", "audio", "file")  # what inputs take, as /object_info marks them
MODEL_EXTENSIONS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx")
# What inputs for a model are called, of which none is installed.
MODEL_INPUT = re.compile(r"name|model|lora|vae|ckpt|clip|unet|config")
# Names of files that ComfyUI makes, and whose /view answers with 400 or not at all.
SURROGATES = re.compile("[\ud800-\udfff]")  # stand for what is no UTF-8
NOT_GIVEN = re.compile(r"\.\.|[\x00-\x1f\x7f\ud800-\udfff]")
LOOK_UP_SECONDS = 1  # between questions to a ComfyUI that tells nothing by itself


class ComfyUIApi:
    """ComfyUI over HTTP. Raises CONNECTION_LOST where it is away, unless a docstring says more."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = settings.comfyui_api_base.rstrip("/")
        self.name = f"ComfyUI at {self.url} (COMFYUI_API_BASE)"  # where it is not reached
        self.health = Health(settings)
        self._pool = ConnectionPool()
        self._about = {"url": self.url, "version": None, "device": None, "vram_free": None}
        self._probed_at = -math.inf
        self._probe_lock = Lock()
        self._inputs: dict[str, JsonObject] = {}  # by class, asked for once in ComfyUI's life

    def exchange(
        self, path: str, body: Any = None, timeout: float = HTTP_SECONDS
    ) -> tuple[int, Any]:
        """The status and the JSON of an answer, None where it is no JSON. A body is POSTed."""
        data = None if body is None else json.dumps(body).encode()
        with http_exchange(self.url + path, timeout, data, pool=self._pool) as response:
            self.health.answered()
            try:
                # NaN is no JSON, but ComfyUI writes it
                return response.status, json.load(response, parse_constant=str)
            except (ValueError, RecursionError):
                return response.status, None

    def get(self, path: str, timeout: float = HTTP_SECONDS) -> JsonObject:
        """The object that ComfyUI answers with; comfyui_error for anything else."""
        status, answer = self.exchange(path, None, timeout)
        if status != 200 or not isinstance(answer, dict):
            raise unusable_answer(f"GET {path} with {status}")
        return answer

    def retry_while_away(self, job: Job, action: Callable[[], Any]) -> Any:
        """What the action returns, tried again while ComfyUI is away.

        Raises JobError: comfyui_lost after COMFYUI_RETURN_TIMEOUT, or the error of `job.abort`.
        """
        limit = self.settings.comfyui_return_timeout
        give_up_at = math.inf
        while True:
            try:
                return action()
            except CONNECTION_LOST as error:
                # Counted from the first failure: all jobs that wait give up together.
                give_up_at = min(give_up_at, self.health.failed() + limit)
                left = give_up_at - monotonic()
                if left <= 0:
                    raise JobError(
                        502,
                        "comfyui_lost",
                        f"{self.name} went away and was not back in order within {limit:g} s:"
                        f" {describe_error(error)}",
                    ) from None
            # Wakes for an abort or a reconnection; the action finds out about the rest.
            job.next_notice(min(left, LOOK_UP_SECONDS))

    def probe(self) -> JsonObject:
        """url, version, device and vram_free (bytes), asked for once a second for all who probe."""
        with self._probe_lock:
            if monotonic() - self._probed_at >= PROBE_EVERY_SECONDS:
                try:
                    self.ask_stats(PROBE_SECONDS)
                except (*CONNECTION_LOST, JobError):
                    self.health.failed()
                self._probed_at = monotonic()
        return self._about

    @bad_answer_as_502()
    def ask_stats(self, timeout: float = HTTP_SECONDS) -> JsonObject:
        """What `probe` returns, asked for now."""
        stats = self.get("/system_stats", timeout)
        device = stats["devices"][0]
        self._about = {
            "url": self.url,
            "version": stats["system"].get("comfyui_version"),
            "device": device.get("name"),
            "vram_free": device.get("vram_free"),
        }
        return self._about

    @bad_answer_as_502()
    def find_history(self, prompt_id: str) -> JsonObject:
        """The history's entry for the prompt; empty where there is none."""
        path = f"/history/{quote(prompt_id, safe='')}"  # the id may be another client's
        entries = self.get(path, self.settings.comfyui_silence_timeout)
        # A copy that is no deeper than what can be searched and written later.
        return dict(map_strings(entries.get(prompt_id) or {}, str, MAX_HISTORY_DEPTH))

    @bad_answer_as_502()
    def ask_queue(self) -> tuple[list[Any], list[Any]]:
        """ComfyUI's entries for the prompts that run, and for those that wait, next one first.

        [number, prompt id, graph, extra data, ids of output nodes, …]
        """
        queues = self.get("/queue", self.settings.comfyui_silence_timeout)
        return queues["queue_running"], sorted(queues["queue_pending"], key=itemgetter(0))

    @bad_answer_as_502()
    def is_queued(self, prompt_id: str) -> bool:
        """Whether ComfyUI runs the prompt, or will."""
        running, waiting = self.ask_queue()
        return any(item[1] == prompt_id for item in running + waiting)

    def cancel_prompt(self, prompt_id: str) -> None:
        """Takes the prompt out of ComfyUI's queue, or off the GPU."""
        timeout = self.settings.comfyui_silence_timeout
        # Where ComfyUI has it, this does the right thing in one step.
        if self.exchange(f"/api/jobs/{prompt_id}/cancel", {}, timeout)[0] == 200:
            return
        self.exchange("/queue", {"delete": [prompt_id]}, timeout)
        # Versions before the targeted interrupt stop whoever runs: ours has to be the one.
        if not self.find_history(prompt_id) and self.is_queued(prompt_id):
            self.exchange("/interrupt", {"prompt_id": prompt_id}, timeout)

    def clear_cache(self) -> None:
        """Has ComfyUI forget what it has made, and unload its models."""
        with suppress(*CONNECTION_LOST):  # one that has died has no cache
            self.exchange("/free", {"free_memory": True})

    @contextmanager
    def view(self, output: Output, conversion: str = "") -> Iterator[Any]:
        """Opens a file that the history names, as it is or with a conversion such as "webp;90".

        Notes its mimetype and size (bytes) in the output. Raises JobError: output_missing, or
        comfyui_error where ComfyUI does not give it.
        """
        with ExitStack() as stack:
            if os.path.isabs(output["subfolder"]):
                raise not_given(output, "it lies outside of ComfyUI's folders")
            if is_withheld(output):
                file = stack.enter_context(_open_local(output))
                output["mimetype"] = mimetypes.guess_type(output["filename"])[0] or OCTET_STREAM
                output["size"] = os.fstat(file.fileno()).st_size
                yield file
                return
            response = self._request_view(stack, output, conversion)
            if response.status == 404:
                raise file_missing(output)
            if response.status != 200 or response.length is None:
                raise not_given(output, f"it answers with {response.status}")
            output["mimetype"] = response.headers.get_content_type()
            output["size"] = response.length
            yield response

    def has_file(self, output: Output) -> bool:
        """Whether ComfyUI has the file."""
        try:
            with self.view(output):
                return True
        except JobError:
            return False

    def _request_view(self, stack: ExitStack, output: Output, conversion: str) -> HTTPResponse:
        query = {name: output[name] for name in FILE_DEFAULTS}
        if conversion:
            query["preview"] = conversion
        url = f"{self.url}/view?{urlencode(query, errors='surrogateescape')}"
        trouble: Exception | None = None
        for _ in range(VIEW_TRIES):
            try:
                return stack.enter_context(
                    # An SVG is given as one only to those who say that they show it as a picture.
                    http_exchange(url, headers={"Sec-Fetch-Dest": "image"}, pool=self._pool)
                )
            except CONNECTION_LOST as error:
                trouble = error
                self.ask_stats()  # raises CONNECTION_LOST itself where all of ComfyUI is away
        raise not_given(output, f"it ends the connection ({trouble})")

    @bad_answer_as_502()
    def upload_input(self, file: BinaryIO, name: str) -> str:
        """Puts the file into ComfyUI's input folder; returns its name there. 400 if too large."""
        boundary = name[:64]  # the file's SHA-256; more than 70 characters are refused
        size = file.seek(0, os.SEEK_END)
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            f"Content-Type: {OCTET_STREAM}\r\n\r\n"
        ).encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        total = len(head) + size + len(tail)
        features = self.exchange("/features")[1] or {}  # older ones do not tell
        if total <= features.get("max_upload_size", math.inf):
            headers = {
                "Content-Type": f"multipart/form-data; boundary={boundary}",
                "Content-Length": str(total),
            }
            body, url = _multipart_pieces(head, file, tail), f"{self.url}/upload/image"
            with http_exchange(url, HTTP_SECONDS, body, headers, self._pool) as answer:
                if answer.status == 200:
                    return str(json.load(answer)["name"])
                if answer.status != 413:
                    raise unusable_answer(f"POST /upload/image with {answer.status}")
        raise bad_request(
            f"an input file of {size} bytes is more than ComfyUI takes;"
            " start it with a larger --max-upload-size",
            "input_unavailable",
        )

    @bad_answer_as_502()
    def choice_of(self, class_type: str, name: str) -> str:
        """What a text in this input chooses, as far as it is known, or "".

        An 'image', a 'video', an 'audio' or another 'file' in ComfyUI's input folder, or a 'model'.
        """
        inputs = self._inputs.get(class_type)
        if inputs is None:
            self._inputs[class_type] = inputs = self._ask_inputs(class_type)
        kind, options = find_input(inputs, name)
        for each in UPLOADS:
            if options.get(f"{each}_upload"):
                return each if options.get("image_folder", "input") == "input" else ""
        if not isinstance(kind, list) and kind != "COMBO":
            return ""
        offered = [str(each) for each in _offered(kind, options)]
        if any(each.endswith(MODEL_EXTENSIONS) for each in offered):
            return "model"
        if not offered:
            return "model" if MODEL_INPUT.search(name) else "file"
        return "file" if all(re.search(r"\.\w{2,12}$", each) for each in offered) else ""

    def missing_nodes(self, graph: Graph) -> Graph:
        """The nodes whose class ComfyUI has not."""
        known: dict[str, bool] = {}
        for class_type in {node["class_type"] for node in graph.values()}:
            if len(known) < MAX_ASKED_CLASSES:
                path = f"/object_info/{quote(class_type, safe='')}"
                known[class_type] = class_type in (self.exchange(path)[1] or {})
        return {key: node for key, node in graph.items() if not known.get(node["class_type"], True)}

    def reset(self) -> None:
        """Forgets connections and classes: the next ComfyUI may be another."""
        self._pool.clear()
        self._inputs = {}

    @bad_answer_as_502()
    def choices(self, class_type: str, name: str) -> list[str]:
        """What ComfyUI offers for an input of a node; comfyui_unavailable where it is away."""
        return [str(each) for each in _offered(*find_input(self._ask_inputs(class_type), name))]

    @bad_answer_as_502()
    def _ask_inputs(self, class_type: str) -> JsonObject:
        try:
            classes = self.get(f"/object_info/{quote(class_type, safe='')}")
        except CONNECTION_LOST:
            raise unavailable("unreachable", self.name) from None
        if class_type not in classes:
            raise JobError(
                422,
                "workflow_rejected",
                f"ComfyUI has no node {class_type}: check the spelling, or install what brings it",
            )
        return _all_inputs(classes[class_type]["input"])


def _all_inputs(declared: JsonObject) -> JsonObject:
    return {**declared.get("required", {}), **declared.get("optional", {})}


def find_input(inputs: JsonObject, name: str) -> tuple[Any, JsonObject]:
    """The type and the options of an input as /object_info declares it; (None, {}) if it does not.

    A name with a dot, such as "format.bit_depth", is an input within a dynamic one: of one of its
    choices, or the one that it has any number of.
    """
    if name in inputs:
        kind, *more = inputs[name]
        return kind, more[0] if more and isinstance(more[0], dict) else {}
    front, _, rest = name.partition(".")
    kind, options = find_input(inputs, front) if rest else (None, {})
    if kind == "COMFY_AUTOGROW_V3":
        grown = _all_inputs(options["template"]["input"])
        return find_input(grown, next(iter(grown)))
    if kind == "COMFY_DYNAMICCOMBO_V3":
        for option in options["options"]:
            found = find_input(_all_inputs(option["inputs"]), rest)
            if found[0]:
                return found
    return None, {}


def _offered(kind: Any, options: JsonObject) -> list[Any]:
    # [[choice, …], {…}] or, as newer nodes have it, ["COMBO", {"options": [choice, …]}]
    offered = kind if isinstance(kind, list) else options.get("options", [])
    return [each["key"] if isinstance(each, dict) else each for each in offered]


def is_withheld(output: Output) -> bool:
    """Whether ComfyUI's /view refuses a file that it has, for its name's sake."""
    is_refused = NOT_GIVEN.search(output["filename"]) or SURROGATES.search(output["subfolder"])
    return is_refused is not None


def _open_local(output: Output) -> BinaryIO:
    """Opens a file that /view will not give where the worker knows ComfyUI's folder."""
    if "local_path" not in output:
        raise not_given(output, "names with .. or control codes are refused by its /view")
    try:
        return open(output["local_path"], "rb")
    except OSError:
        raise file_missing(output) from None


def file_missing(output: Output) -> JobError:
    """The error of a file that ComfyUI's history names and its disk has not."""
    name = show(output["filename"])
    return JobError(502, "output_missing", f"{name} is not on ComfyUI's disk")


def not_given(output: Output, reason: str) -> JobError:
    """The error of a file that ComfyUI has and does not give, although it is up."""
    name = show(output["filename"])
    return JobError(502, "comfyui_error", f"ComfyUI does not give the file {name}: {reason}")


def check_prefixes(job: Job) -> None:
    """400 for a literal filename_prefix whose files could be made, but not be fetched.

    A warning of one with a placeholder that would be left as it is.
    """
    for node_id, node in job.workflow.items():
        for name, value in node["inputs"].items():
            if not isinstance(value, str) or not name.endswith("filename_prefix"):
                continue
            where = f"{name} of {node['class_type']} (node {node_id})"
            # What ComfyUI itself fills in, such as %year% and %width%, has no such character.
            left = [each for each in re.findall("%[^%]+%", cut(value)) if re.search("[:.]", each)]
            if left and len(job.warnings) < MAX_WARNINGS:
                job.warnings.append(f"{where} has {show(left[0])}, which only the editor fills in")
            if job.settings.comfyui_install_path:  # such files are read from there
                continue
            if NOT_GIVEN.search(value.replace("\\", "/").rpartition("/")[2]):
                raise bad_request(
                    f"{where} has .. or a control code in {show(value)}:"
                    " ComfyUI would not give such a file; choose another one"
                )


def _multipart_pieces(head: bytes, file: BinaryIO, tail: bytes) -> Iterator[bytes]:
    yield head
    yield from read_pieces(file)
    yield tail


# ComfyUI: running a prompt ########################################################################

PREVIEW_WITH_METADATA = 4  # a binary frame: the metadata's size and JSON, then the picture
PREVIEW_SECONDS = 0.5
FEATURES = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
OLDEST_COMFYUI = (0, 3, 45)  # July 2025: the first one that lets the caller choose the prompt id
RECONNECT_SECONDS = 0.5
MIN_PING_SECONDS = 5
MAX_LOSSES = 2  # of a prompt that ComfyUI has had
CANCEL_TRIES = 3
REPORT_SECONDS = 60  # between the lines that the log has about a long job
SAMPLER_WEIGHT = 20  # in a job's progress: a step takes about as long as another node
# The errors after which, in the words of CUDA's documentation, the process must be relaunched.
GPU_FAULT = re.compile(
    r"\A(?:(CUDA|HIP) error: (an illegal|device-side assert|unspecified launch|misaligned|hardware"
    r"|invalid program counter|the launch timed|uncorrectable|operation not supported on global)"
    r"|\w+ error: \w+_EXECUTION_FAILED)"
)


class PromptRunner:
    """Runs one prompt at a time, and listens to the websocket that tells when it has ended."""

    def __init__(self, api: ComfyUIApi) -> None:
        self._api = api
        self._settings = api.settings
        self._health = api.health
        self._socket: websocket.WebSocket | None = None
        self._client_id = ""  # of the websocket's connection; empty while there is none
        self._job: Job | None = None
        self._forwarded_at = 0.0
        self._last_error = ""
        self._has_given_up = False
        self._next_preview_at = 0.0
        self._interrupted: set[str] = set()  # ids of prompts that ComfyUI has yet to let go of

    # The websocket

    def listen(self) -> None:
        """Keeps the websocket connected and drained, for ever."""
        pause = Event()
        while True:
            try:
                self._receive()
            except Exception as error:  # whatever a server sends, the next one has to be heard
                self._on_websocket_lost(error)
            pause.wait(RECONNECT_SECONDS)  # nobody tells when a server comes up

    def _receive(self) -> None:
        with closing(self._connect()) as connection:
            kind = None
            while kind != websocket.ABNF.OPCODE_CLOSE:
                kind, frame = self._next_frame(connection)
                self._health.heard()
                if kind == websocket.ABNF.OPCODE_TEXT:
                    self._on_frame(json.loads(frame, parse_constant=str))
                elif kind == websocket.ABNF.OPCODE_BINARY:
                    self._on_binary_frame(frame)
        raise ConnectionError("ComfyUI closed the websocket")

    def _next_frame(self, connection: websocket.WebSocket) -> tuple[int, bytes]:
        """The kind and the data of the next frame; TimeoutError where a ping has brought none.

        A ComfyUI that hangs closes nothing, nor does one whose machine has gone.
        """
        with suppress(websocket.WebSocketTimeoutException):
            return connection.recv_data(control_frame=True)
        connection.ping()
        with suppress(websocket.WebSocketTimeoutException):
            return connection.recv_data(control_frame=True)
        raise TimeoutError

    def _connect(self) -> websocket.WebSocket:
        """Opens a connection with an id of its own, and tells health and the running job of it.

        ComfyUI may tell nothing to a second connection with the id of one that was lost.
        """
        about = self._api.ask_stats()
        client_id = uuid4().hex
        url = f"ws{self._api.url[4:]}/ws?clientId={client_id}"
        # Handed a connected socket, websocket-client does not look for a proxy.
        connection = websocket.create_connection(
            url,
            socket=connect(self._api.url, HTTP_SECONDS).sock,
            skip_utf8_validation=True,
            suppress_origin=True,
        )
        connection.send(json.dumps(FEATURES))
        connection.recv()  # ComfyUI knows the client id once it has sent its first status
        # After so much silence it is pinged, and has as long again to answer.
        connection.settimeout(max(MIN_PING_SECONDS, self._settings.comfyui_return_timeout / 2))
        fault = self._health.fault
        if fault and not self._api.find_history(fault) and not self._api.is_queued(fault):
            self._health.mended()
        self._socket, self._client_id = connection, client_id
        self._health.connected()
        self._forward(self._job, Notice("connected"))
        version, device, at = str(about["version"]), about["device"], self._api.url
        log.info("WORKER_READY: connected to ComfyUI %s on %s at %s", version, device, at)
        numbers = [int(each) for each in re.findall(r"\d+", version)[:3]]
        if numbers < list(OLDEST_COMFYUI):
            log.error(
                "this ComfyUI is too old: update it to 0.3.45 or later,"
                " which lets a caller choose the prompt id"
            )
        return connection

    def _on_websocket_lost(self, error: Exception) -> None:
        described = describe_error(error)
        if self._client_id:
            log.warning("lost the connection to %s: %s", self._api.name, described)
        elif described != self._last_error:
            log.warning("cannot reach %s: %s", self._api.name, described)
        self._last_error, self._client_id = described, ""
        self._api.reset()
        self._health.disconnected(was_silent=isinstance(error, TimeoutError))
        self._forward(self._job, Notice("connection_lost"))
        is_given_up = self._health.needs_restart
        if is_given_up and not self._has_given_up and not self._health.fault:  # which was logged
            log.error(
                "WORKER_ERROR: %s is not back in order after %g s",
                self._api.name,
                self._settings.comfyui_return_timeout,
            )
        self._has_given_up = is_given_up

    def _on_frame(self, message: Any) -> None:
        """Passes on what the job needs; waking its thread for all takes 4 % of a short job."""
        # Custom nodes send what they like.
        with suppress(AttributeError, KeyError, TypeError):
            job, kind, data = self._job, str(message["type"]), message["data"]
            if not job or data["prompt_id"] != job.prompt_id:
                return
            is_step = kind in ("execution_start", "execution_error") or _is_end(kind, data)
            # The rest shows now and then that the connection lives.
            is_due = monotonic() - self._forwarded_at > self._settings.comfyui_silence_timeout / 2
            if kind == "progress_state":
                # Where somebody listens and none is in the inbox already.
                is_due = is_due or (job.on_event is not None and not job.node_states)
                job.node_states = data["nodes"]
            if is_step or is_due or (job.on_event and kind == "execution_cached"):
                self._forward(job, Notice(kind, data))

    def _on_binary_frame(self, frame: bytes) -> None:
        """Passes on a picture that grows, if it is one, twice a second at most."""
        job = self._job
        if not job or not job.wants_previews or monotonic() < self._next_preview_at:
            return
        # Custom nodes send what they like.
        with suppress(AttributeError, KeyError, RecursionError, TypeError, ValueError):
            kind, size = int.from_bytes(frame[:4], "big"), int.from_bytes(frame[4:8], "big")
            if kind != PREVIEW_WITH_METADATA:
                return
            about = json.loads(frame[8 : 8 + size], parse_constant=str)
            picture = frame[8 + size :]
            if about["prompt_id"] == job.prompt_id:
                self._next_preview_at = monotonic() + PREVIEW_SECONDS
                node_id, mimetype = about["display_node_id"], about["image_type"]
                data = base64.b64encode(picture)
                job.notify("preview", node_id=node_id, mimetype=mimetype, data=data)

    def _forward(self, job: Job | None, notice: Notice) -> None:
        if job:
            self._forwarded_at = monotonic()
            job.inbox.put(notice)

    # One prompt

    def run(self, job: Job) -> None:
        """Runs the job's workflow to its end; `read_history` then tells what became of it.

        Raises JobError: workflow_rejected, timeout, cancelled, comfyui_lost, comfyui_error, or the
        error of `job.abort`.
        """
        self._job = job
        self._health.prompt_running(True)
        may_be_queued = False  # in ComfyUI, with nobody who waits for it
        try:
            losses, give_up_at = 0, math.inf
            while losses < MAX_LOSSES and monotonic() < give_up_at:
                client_id = self._api.retry_while_away(job, self._get_client_id)
                limit = self._settings.comfyui_return_timeout
                give_up_at = min(give_up_at, monotonic() + limit)  # of a prompt that never arrives
                self._interrupted.discard(job.prompt_id)
                may_be_queued, job.is_posted = True, False
                is_told = self._submit(job, client_id)
                if self._wait(job, client_id if is_told else ""):
                    may_be_queued = False
                    return
                log.warning("job %s: ComfyUI has lost its prompt, or does not run it", job.id)
                if job.is_posted or client_id != self._client_id:
                    losses, give_up_at = losses + 1, math.inf
        except JobError as error:
            may_be_queued = may_be_queued and error.type != "workflow_rejected"
            raise
        finally:
            self._job = None
            self._health.prompt_running(False)
            if may_be_queued:
                self._cancel_prompt(job)
        why = "ComfyUI died twice under this job: it may be the job that kills it"
        if losses < MAX_LOSSES:
            why = f"{self._api.name} does not answer when it is sent this job"
        raise JobError(502, "comfyui_lost", why)

    def _submit(self, job: Job, client_id: str) -> bool:
        """Posts the prompt, and says whether its answer came: without it, nobody will be told."""
        prompt = {"prompt": job.workflow, "prompt_id": job.prompt_id, "client_id": client_id}
        extra = {
            "api_key_comfy_org": job.settings.comfy_org_api_key,
            "extra_pnginfo": job.request.extra_pnginfo,
            "preview_method": "auto" if job.wants_previews else "",
        }
        prompt["extra_data"] = {name: value for name, value in extra.items() if value}
        try:
            status, answer = self._api.exchange("/prompt", prompt)
        except CONNECTION_LOST:
            return False
        finally:
            job.submitted.set()
        with bad_answer_as_502():
            if status == 400:
                raise Rejected(answer)
            answer = scrub(answer, own_words(job.workflow))
            if status != 200 or answer["prompt_id"] != job.prompt_id:
                raise unusable_answer(f"POST /prompt with {status}")
            job.is_posted = True
            if errors := answer.get("node_errors"):
                dropped = describe_node_errors(errors, job.workflow, self._api.choices)
                warning = f"ComfyUI dropped the outputs that depend on invalid nodes: {dropped}"
                if warning not in job.warnings:  # of the first run of a job that is run again
                    job.warnings.append(warning)
        return True

    def _get_client_id(self) -> str:
        """The websocket's client id; ConnectionError while no prompt can be run for it."""
        if self._health.fault:
            raise ConnectionError("it is broken and has to be restarted")
        if not self._client_id:
            raise ConnectionError("its websocket cannot be reached")
        return self._client_id

    def _wait(self, job: Job, client_id: str) -> bool:
        """True once the prompt has ended, False if ComfyUI lost it.

        Raises JobError: timeout, cancelled, comfyui_lost, or the error of `job.abort`.
        """
        progress = Progress(job)
        job.deadline = job.stuck_at = math.inf
        began = reported_at = monotonic()
        while True:
            # ComfyUI tells nothing more to a client whose connection was lost: it has to be asked.
            is_told = client_id != "" and client_id == self._client_id
            pause = self._settings.comfyui_silence_timeout if is_told else LOOK_UP_SECONDS
            notice = job.next_notice(max(0, min(pause, job.deadline - monotonic())))
            self._on_notice(job, progress, notice)
            if monotonic() > reported_at + REPORT_SECONDS:
                reported_at = monotonic()
                log.info("job %s runs for %d s%s", job.id, reported_at - began, progress.summary)
            if _is_end(notice.type, notice.data):
                return True
            if notice.type in ("silence", "connection_lost", "connected"):
                found = self._api.retry_while_away(job, lambda: self._look_up(job))
                if is_told and client_id == self._client_id:
                    self._check_told(found, notice)
                if found in ("ended", "lost"):
                    return bool(found == "ended")
                if self._is_stuck(job, found):
                    self._cancel_prompt(job)
                    return False
            if monotonic() > job.deadline:
                limit = self._settings.job_timeout
                raise JobError(
                    504, "timeout", f"the job took more than the {limit:g} s of JOB_TIMEOUT"
                )

    def _begin_deadline(self, job: Job) -> None:
        """The prompt has begun: its time counts."""
        if job.deadline == math.inf and self._settings.job_timeout:
            job.deadline = monotonic() + self._settings.job_timeout

    def _is_stuck(self, job: Job, found: str) -> bool:
        """Whether a prompt that is still queued will never begin, as ComfyUI runs none."""
        if found == "running":
            self._begin_deadline(job)
            return False
        if found == "next":
            stuck_at = monotonic() + self._settings.comfyui_stuck_timeout
            job.stuck_at = min(job.stuck_at, stuck_at)
        else:
            job.stuck_at = math.inf
        if monotonic() > job.stuck_at:
            self._on_stuck(self._find_witness() or job.prompt_id)
        return self._health.fault != ""

    def _find_witness(self) -> str:
        """The id of a prompt that ComfyUI knows until it restarts, or ""."""
        with suppress(*CONNECTION_LOST, JobError), bad_answer_as_502():
            running, _ = self._api.ask_queue()
            known = [item[1] for item in running] or list(self._api.get("/history?max_items=1"))
            return str(known[0])
        return ""

    def _on_stuck(self, prompt_id: str) -> None:
        if not self._health.fault:
            log.error(
                "WORKER_ERROR: ComfyUI takes prompts and runs none, as if its prompt thread had"
                " ended; nothing runs until it restarts"
            )
            self._health.broken(prompt_id)

    def _watch_interrupted(self, prompt_id: str, is_cancelled: bool) -> None:
        """Returns when ComfyUI has let go of the prompt; one that does not runs nothing more.

        The prompt is cancelled until that has worked once.
        """
        limit, pause = self._settings.comfyui_stuck_timeout, Event()
        stuck_at, is_stuck = monotonic() + limit, False
        while prompt_id in self._interrupted and self._has_prompt(prompt_id):
            if not is_cancelled:
                is_cancelled, stuck_at = self._try_cancel(prompt_id, 1), monotonic() + limit
            elif monotonic() > stuck_at and not self._health.is_failing:
                self._on_stuck(prompt_id)
                is_stuck = True
            pause.wait(LOOK_UP_SECONDS)
        self._interrupted.discard(prompt_id)
        if is_stuck and self._health.fault == prompt_id:
            self._health.mended()

    def _has_prompt(self, prompt_id: str) -> bool:
        try:
            return self._api.is_queued(prompt_id)
        except (*CONNECTION_LOST, JobError):
            return True  # as far as is known

    def _check_told(self, found: str, notice: Notice) -> None:
        """Raises cancelled for a deleted prompt; replaces a websocket that missed the end."""
        if found == "lost":
            raise JobError(499, "cancelled", "the job was deleted from ComfyUI's queue")
        if found == "ended" and notice is SILENCE and self._socket:
            self._socket.abort()  # type: ignore[no-untyped-call]

    def _on_notice(self, job: Job, progress: Progress, notice: Notice) -> None:
        """Takes note of what ComfyUI tells of a running job; what makes no sense costs no job."""
        if notice.type == "execution_start":
            self._begin_deadline(job)
        with suppress(JobError, *CONNECTION_LOST), bad_answer_as_502():
            if notice.type == "execution_error":
                self._check_gpu(job, notice.data["exception_message"])
            if notice.type == "execution_cached" and job.on_event:
                progress.begin(self._find_output_nodes(job), notice.data["nodes"])
            if notice.type == "progress_state" and job.node_states:
                states, job.node_states = job.node_states, {}
                progress.update(states)

    def _find_output_nodes(self, job: Job) -> list[str]:
        """The nodes that ComfyUI runs the prompt for: those outputs that it accepted."""
        running, _ = self._api.ask_queue()
        return next((list(item[4]) for item in running if item[1] == job.prompt_id), [])

    @bad_answer_as_502()
    def _look_up(self, job: Job) -> str:
        """Asks for the prompt: 'ended' (sets the job's history), 'running', 'queued' or 'lost'.

        'next': it is the next one, and nothing runs but what was interrupted.
        """
        for _ in range(2):  # it may end between the two questions
            job.history = self._api.find_history(job.prompt_id)
            if job.history:
                messages = failure_messages(job.history) or {}
                error = messages.get("execution_error", {})
                self._check_gpu(job, str(error.get("exception_message", "")))
                return "ended"
            running, waiting = [[item[1] for item in items] for items in self._api.ask_queue()]
            job.is_posted = job.is_posted or job.prompt_id in running + waiting
            if job.prompt_id in running:
                return "running"
            if job.prompt_id in waiting:
                is_next = job.prompt_id == waiting[0] and self._interrupted.issuperset(running)
                return "next" if is_next else "queued"
        return "lost"

    def _check_gpu(self, job: Job, message: str) -> None:
        if GPU_FAULT.match(cut(message)) and self._health.fault != job.prompt_id:
            log.error(
                "WORKER_ERROR: job %s has broken the GPU; nothing runs until ComfyUI restarts",
                job.id,
            )
            self._health.broken(job.prompt_id)

    def _cancel_prompt(self, job: Job) -> None:
        """Has ComfyUI forget the prompt: at once, or in a thread as soon as it answers."""
        self._interrupted.add(job.prompt_id)
        tries = 1 if self._health.is_failing else CANCEL_TRIES
        is_cancelled = self._try_cancel(job.prompt_id, tries)
        start_thread("interrupted", self._watch_interrupted, job.prompt_id, is_cancelled)

    def _try_cancel(self, prompt_id: str, tries: int) -> bool:
        for _ in range(tries):
            try:
                self._api.cancel_prompt(prompt_id)
                return True
            except (*CONNECTION_LOST, JobError):
                Event().wait(RECONNECT_SECONDS)
        return False

    def read_history(self, job: Job) -> None:
        """Looks up, without the GPU, what became of a job; output_missing if ComfyUI forgot it."""
        if not job.history:
            found = self._api.retry_while_away(job, lambda: self._look_up(job))
            if found not in ("ended", "lost"):  # some node has told a false end
                found = self._wait_for_true_end(job)
            if found != "ended":
                raise JobError(502, "output_missing", "ComfyUI died with the job's history")

    def _wait_for_true_end(self, job: Job) -> str:
        try:
            return "ended" if self._wait(job, client_id="") else "lost"
        except JobError:
            self._cancel_prompt(job)
            raise


def _is_end(kind: str, data: JsonObject) -> bool:
    """Whether a prompt has ended and its history is written, which no other message tells."""
    return kind == "executing" and data.get("node", "") is None


class Progress:
    """How far a job is, in percent of what there is to do: steps are parts of their node.

    A node with a seed or a latent_image, as samplers have, weighs SAMPLER_WEIGHT, any other 1. What
    is cached weighs nothing, so that the bar begins near 0; so does what no accepted output needs.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._weights: dict[str, int] = {}  # by node id
        self.summary = ""  # for the log

    def begin(self, output_nodes: list[str], cached: list[str]) -> None:
        """Takes the ids of the nodes that the job is run for, and of those that are cached."""
        graph, ahead, known = self._job.workflow, list(output_nodes), frozenset(cached)
        while ahead:
            node_id = ahead.pop()
            if node_id in self._weights:
                continue
            self._weights[node_id] = 0
            if node_id in known:
                continue
            inputs = graph[node_id]["inputs"]
            is_sampler = inputs.keys() & {"seed", "latent_image"}
            self._weights[node_id] = SAMPLER_WEIGHT if is_sampler else 1
            links = [each for each in inputs.values() if isinstance(each, list) and len(each) == 2]
            ahead += [node_id for node_id, _ in links if node_id in graph]

    def update(self, states: JsonObject) -> None:
        """Takes the states of nodes that have begun: {id: {"value": …, "max": …, "state": …}}."""
        done = 0.0
        for node_id, state in states.items():
            done += self._weights.get(node_id, 0) * min(1, state["value"] / (state["max"] or 1))
        percent = round(100 * done / (sum(self._weights.values()) or 1), 1)
        self._job.percent = max(self._job.percent, percent)  # a job that is run again begins anew
        # The node that runs, else the one that began last; the submitted one if it expanded.
        node_id, state = sorted(states.items(), key=lambda each: each[1]["state"] == "running")[-1]
        node_id = state.get("display_node_id", node_id)
        node_type = self._job.workflow.get(str(node_id), {}).get("class_type")
        value, end = state["value"], state["max"]
        self.summary = f": {node_type} (node {node_id}), {value} of {end}"
        self._job.notify(
            "progress",
            node_id=node_id,
            node_type=node_type,
            value=value,
            max=end,
            percent=self._job.percent,
        )


# Delivery #########################################################################################

MAX_BASE64_FILES = 4  # of the largest size that one answer carries; or more that are smaller
_BASE64_LOCK = Lock()
MAX_OWED_WEBHOOKS = 10000
MAX_OWED_TO_RECEIVER = 5000  # to one that requests name
MANY_TRIES = 64  # at once, to the receivers that requests name
MAX_TRIES = 256
MAX_TRIES_OF_RECEIVER = 16
SPOOL_BYTES = 1 << 14  # of an owed webhook that are kept in memory; a larger one waits on disk


def deliver(job: Job, api: ComfyUIApi) -> None:
    """Puts into `job.outputs` every text, and every file that is no preview.

    A file gets its mimetype, its size, and a url or data. The first failure (upload_failed,
    output_missing, comfyui_error) is raised once all the others are delivered.
    """
    made = read_outputs(job.history, job.workflow)
    job.animated = find_animated(job.history)
    for output in made:
        if "filename" in output and "value" in output:
            is_file = api.retry_while_away(job, partial(api.has_file, output))
            for name in ["value"] if is_file else FILE_DEFAULTS:
                del output[name]
    job.outputs = [output for output in made if output.get("type") != "temp"]
    if not job.outputs and failure_messages(job.history) is None:
        what = "only previews (type temp), which are not delivered" if made else "no outputs"
        job.warnings.append(f"the job made {what}; use a node that saves, such as SaveImage")
    # Bytes as an answer leave nobody to see the envelope, unless a webhook has it.
    deliver_files(job, api, not job.request.wants_file or job.settings.webhook_url != "")


def deliver_files(job: Job, api: ComfyUIApi, is_shown: bool) -> None:
    """Delivers the job's files, a few at a time. is_shown: somebody will see the envelope."""
    keys = s3_keys(job) if job.settings.s3_bucket_name else [""] * len(job.files)
    deliver_one = partial(_deliver_file, job, api, is_shown)
    if len(keys) == 1:  # without the cost of a thread
        deliver_one(job.files[0], keys[0])
        return
    try:
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            deliveries = pool.map(deliver_one, job.files, keys)
        list(deliveries)  # raises the first error
    except RuntimeError:  # the system has no more threads
        with ExitStack() as stack:  # it runs all of them, and raises an error at its end
            for output, key in zip(job.files, keys, strict=True):
                stack.callback(deliver_one, output, key)


def _deliver_file(job: Job, api: ComfyUIApi, is_shown: bool, output: Output, key: str) -> None:
    if path := find_local(job.settings.comfyui_install_path, output):
        output["local_path"] = path
    try:
        api.retry_while_away(job, lambda: _deliver_content(job, api, is_shown, output, key))
    except JobError as error:
        if "upload_error" not in output:
            output["error"] = error.message
        if os.path.isabs(output["subfolder"]):  # no path leaves the machine
            output["subfolder"] = ""
        raise


def find_local(comfyui_folder: str, output: Output) -> str:
    """The file's path, if it is below ComfyUI's own folder of its type on this machine, or ""."""
    if not comfyui_folder or output["type"] not in ("output", "input", "temp"):
        return ""
    root = os.path.join(os.path.abspath(comfyui_folder), output["type"])
    path = os.path.abspath(os.path.join(root, output["subfolder"], output["filename"]))
    return path if path.startswith(root + os.sep) and os.path.isfile(path) else ""


def _deliver_content(job: Job, api: ComfyUIApi, is_shown: bool, output: Output, key: str) -> None:
    """Uploads or embeds the file. Called again, it does not send again what S3 has taken."""
    conversion = conversion_of(job, output)
    try:
        if job.settings.s3_bucket_name and "url" not in output:
            upload_to_s3(job, api, output, conversion, key)
    finally:  # the work is not lost when S3 fails
        is_due = job.request.return_outputs_as_base64 or "url" not in output
        if is_due and "data" not in output:
            _embed(job, api, is_shown, output, conversion)


def _embed(job: Job, api: ComfyUIApi, is_shown: bool, output: Output, conversion: str) -> None:
    """Puts the file's bytes into the output if they are wanted; mimetype and size always are."""
    is_wanted = job.request.return_outputs_as_base64 and is_shown
    with api.view(output, conversion) as file:
        if not is_wanted and "upload_error" not in output:
            return
        if refusal := _claim_base64(job, output["size"]):
            output["error"] = refusal
            return
        try:
            output["data"] = base64.b64encode(file.read())
        except CONNECTION_LOST:  # there may be another try
            _claim_base64(job, -output["size"])
            raise


def _claim_base64(job: Job, size: int) -> str:
    """Counts a file of that size among those of the answer; returns why there is no room for it."""
    limit = job.settings.output_base64_max_bytes
    if size > limit:
        return f"{size} bytes are more than the {limit} of OUTPUT_BASE64_MAX_BYTES; use S3"
    with _BASE64_LOCK:
        if job.embedded_bytes + size > MAX_BASE64_FILES * limit:
            return (
                f"with {size} bytes more, the answer's files would be larger than"
                f" {MAX_BASE64_FILES} times the {limit} of OUTPUT_BASE64_MAX_BYTES; use S3"
            )
        job.embedded_bytes += size
    return ""


def conversion_of(job: Job, output: Output) -> str:
    """What /view is to convert the file to, such as "webp;90"; empty where it stays as it is."""
    request = job.request
    if not request.output_format or is_withheld(output):
        return ""
    is_fit = is_still_image(output, job.animated)
    return f"{request.output_format};{request.output_quality}" if is_fit else ""


def delivered_name(output: Output, conversion: str) -> str:
    """The file's name, with the extension of what it is converted to."""
    stem, extension = os.path.splitext(output["filename"])
    return f"{stem}.{conversion.partition(';')[0]}" if conversion else stem + extension


MODEL_TYPES = {  # of 3D files, which few systems know
    ".glb": "model/gltf-binary",
    ".gltf": "model/gltf+json",
    ".obj": "model/obj",
    ".stl": "model/stl",
    ".fbx": "model/vnd.fbx",
    ".ply": "model/ply",
    ".splat": "model/splat",
    ".usdz": "model/vnd.usdz+zip",
}


def types_of(output: Output) -> list[str]:
    """The media types that the file may be asked for by: what /view said, and its name says."""
    extension = os.path.splitext(output["filename"])[1].lower()
    guessed = MODEL_TYPES.get(extension) or mimetypes.guess_type(f"_{extension}")[0] or ""
    return [SAME_TYPES.get(each, each) for each in (output["mimetype"], guessed)]


def choose_answer_file(job: Job, api: ComfyUIApi) -> None:
    """Chooses the file whose bytes the client is to have.

    Where none fits, it raises the 406 not_acceptable, with all of them in the envelope.
    """
    accept = job.request.accept
    for output in job.files:
        conversion = conversion_of(job, output)
        types = [output["mimetype"]] if conversion else types_of(output)
        if accept.endswith("/*"):
            types = [f"{each.partition('/')[0]}/*" for each in types]
        is_fit = accept in types
        if not is_fit and accept in CONVERTED_TYPES:
            is_fit = is_still_image(output, job.animated)
            conversion = f"{accept.removeprefix('image/')};{job.request.output_quality}"
        if is_fit:
            job.answer_file, job.answer_conversion = output, conversion
            return
    deliver_files(job, api, is_shown=True)
    made = ", ".join(output["mimetype"] for output in job.files) or "no file"
    raise JobError(406, "not_acceptable", f"no output is {accept}; there is {made}")


# S3


def s3_keys(job: Job) -> list[str]:
    """The S3 key of each of the job's files; one that is taken gets the file's place behind it.

    Files of one name differ in their type, or in the extension that a conversion replaces. Their
    order, and so their keys, is the same when the job is run again.
    """
    keys: dict[str, None] = {}  # in order, as a list would have them
    for output in job.files:
        folders = output["subfolder"].replace("\\", "/").split("/")
        parts = [str(job.id), *folders, delivered_name(output, conversion_of(job, output))]
        key = job.settings.s3_prefix + "/".join(part for part in parts if part)
        while key in keys:
            stem, extension = os.path.splitext(key)
            key = f"{stem}-{len(keys) + 1}{extension}"
        keys[key] = None
    return list(keys)


def upload_to_s3(job: Job, api: ComfyUIApi, output: Output, conversion: str, key: str) -> None:
    """Streams the file from ComfyUI to S3 and sets its url; else its upload_error, and raises."""
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import ClientError

    settings = job.settings
    where = {"Bucket": settings.s3_bucket_name, "Key": key}
    client = s3_client(settings, "s3_endpoint_url" in job.request.overridden)
    # Without threads, a stream is uploaded in 8 MB of memory instead of 120.
    config = TransferConfig(use_threads=False)
    with (
        every_error_as(partial(_upload_failed, settings, output)),
        api.view(output, conversion) as file,
    ):
        if job.is_id_given:
            with suppress(ClientError):  # there is none, or the keys may not read
                client.head_object(**where)
                job.warnings.append(f"S3 had {show(key)} already: it is replaced")
        more = {"ContentType": output["mimetype"]}
        client.upload_fileobj(file, settings.s3_bucket_name, key, more, Config=config)
    if base := settings.s3_public_url:
        output["url"] = f"{base.rstrip('/')}/{quote(key)}"
    else:
        output["url"] = client.generate_presigned_url("get_object", where, settings.s3_url_expires)
    output.pop("upload_error", None)  # of a try before this one


def _upload_failed(settings: Settings, output: Output, error: Exception) -> Exception:
    from botocore.exceptions import BotoCoreError

    if isinstance(error, CONNECTION_LOST) and not isinstance(error, BotoCoreError):
        return error  # ComfyUI's connection was lost: boto3 has errors of its own for that to S3
    text = str(error)
    for name in reversed(S3_KEYS):
        key = getattr(settings, name)
        text = text.replace(key, "***") if key else text
    text = re.sub(r"(?i)(signature=)[\w%]+", r"\1***", cut(text))
    output["upload_error"] = scrub(text)
    where = f"the S3 bucket {settings.s3_bucket_name}"
    message = f"{where} did not take {show(output['filename'])}: {output['upload_error']}"
    hint = "; check s3 in the request, or the worker's S3_ variables; the file may be in data"
    return JobError(502, "upload_failed", message[: MAX_MESSAGE - len(hint)] + hint)


MAX_S3_ANSWER_BYTES = 1 << 20
S3_ANSWER_SECONDS = 600  # AWS needs minutes to put together a large file
S3_CLIENT_SETTINGS = (
    *S3_KEYS,
    "s3_endpoint_url",
    "s3_region",
    "s3_connect_timeout",
    "s3_connect_attempts",
    "allow_private_addresses",
)
_S3_CLIENT_LOCK = Lock()


def s3_client(settings: Settings, is_own: bool = False) -> Any:
    """A boto3 client for the settings' S3; 400 where none can be made.

    is_own: the endpoint is the request's. No proxy of the environment stands before it, and it may
    not lead to a private address, unless ALLOW_PRIVATE_ADDRESSES lets it.
    """
    relevant = {name: getattr(settings, name) for name in S3_CLIENT_SETTINGS}
    with _S3_CLIENT_LOCK:  # many jobs that come at once are to share one
        return _s3_client(Settings(**relevant), is_own)


@lru_cache  # each session parses the tables of AWS anew, which takes 100 ms and 12 MB
def _s3_session(boto3: Any) -> Any:
    return boto3.Session()


@lru_cache(maxsize=32)  # making a client takes 5 ms; threads can share it
def _s3_client(settings: Settings, is_own: bool) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:  # not every worker needs S3
        raise bad_request(
            "this worker cannot use S3: its operator has to pip install boto3"
        ) from None
    endpoint = settings.s3_endpoint_url or None
    config = Config(
        signature_version="s3v4",
        # With "auto", AWS' presigned URLs lead to us-east-1, whatever the region.
        s3={"addressing_style": "path" if endpoint else "virtual"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        connect_timeout=settings.s3_connect_timeout,
        read_timeout=settings.s3_connect_timeout,
        proxies={} if is_own else None,
        retries={"mode": "standard", "total_max_attempts": settings.s3_connect_attempts},
    )
    region = settings.s3_region or ("us-east-1" if endpoint else None)
    try:
        session = _s3_session(boto3)
        keys = {f"aws_{name[3:]}": getattr(settings, name) or None for name in S3_KEYS}
        client = session.client("s3", region, endpoint_url=endpoint, config=config, **keys)
        client.meta.events.register("before-send.s3", partial(_send_to_s3, client))
        _guard_connections(client, is_own and not settings.allow_private_addresses)
        has_keys = settings.s3_access_key_id or session.get_credentials()
    except (BotoCoreError, ValueError) as error:
        raise bad_request(f"the S3 settings cannot be used: {error}") from None
    if not has_keys:
        raise bad_request(
            "there are no keys for S3:"
            " give s3.access_key_id and s3.secret_access_key, or set them as variables"
        )
    return client


def _guard_connections(client: Any, is_public_only: bool) -> None:
    """Has each answer's head end in time, and connections lead to what was checked."""

    def guard(pool: Any) -> Any:
        class Connection(pool.ConnectionCls):  # type: ignore[misc]
            response_class = CheckedResponse

            def _new_conn(self) -> socket.socket:
                if is_public_only:
                    return _connect_public((self.host, self.port), self.timeout)
                return super()._new_conn()  # type: ignore[no-any-return]

            def getresponse(self, *arguments: Any, **options: Any) -> Any:
                self.last_sock = self.sock  # which http.client may let go of
                with time_limit(self.sock, S3_ANSWER_SECONDS):
                    return super().getresponse(*arguments, **options)

        return type("Pool", (pool,), {"ConnectionCls": Connection})

    manager = client._endpoint.http_session._manager
    pools = manager.pool_classes_by_scheme
    manager.pool_classes_by_scheme = {scheme: guard(pools[scheme]) for scheme in pools}


def _send_to_s3(client: Any, request: Any, **_: Any) -> Any:
    """Sends as botocore does, which would hold an answer of any size in memory."""
    from botocore.awsrequest import AWSResponse
    from botocore.exceptions import HTTPClientError
    from urllib3.exceptions import HTTPError

    request.stream_output = True
    request.headers.pop("Expect", None)  # botocore waits for ever for the end of a 100's head
    response = client._endpoint.http_session.send(request)
    try:
        connection = getattr(response.raw.connection, "last_sock", None)  # a proxy's has none
        with time_limit(connection, S3_ANSWER_SECONDS):
            body = response.raw.read(MAX_S3_ANSWER_BYTES + 1)
    except HTTPError as error:
        raise HTTPClientError(error=error) from None
    if len(body) > MAX_S3_ANSWER_BYTES:
        response.raw.close()
        raise ValueError(f"it answered with more than {MAX_S3_ANSWER_BYTES} bytes")
    raw = SimpleNamespace(stream=lambda: [body])
    return AWSResponse(response.url, response.status_code, response.headers, raw)


# Webhooks


def encode(answer: JsonObject) -> list[bytes]:
    """The answer's JSON in pieces. Base64, held as bytes, is put between, uncopied and unread."""
    files: list[bytes] = []
    mark = uuid4().hex

    def put_aside(data: bytes) -> str:
        files.append(data)
        return mark

    pieces = json.dumps(answer, default=put_aside).encode().split(mark.encode())
    for place, file in enumerate(files):
        pieces.insert(2 * place + 1, file)
    return pieces


@dataclass(frozen=True, repr=False)  # it holds a secret, which a repr would show
class Webhook:
    """A message that is owed to a receiver. It holds all it needs, so its job can be forgotten."""

    id: str  # the prompt's: unlike job_id, no client chooses it; the same on every try
    job_id: str | None
    settings: Settings
    receiver: str  # its host; empty for the operator's own
    is_public_only: bool
    body: BinaryIO


def make_webhook(job: Job, answer: JsonObject) -> Webhook:
    """The message about a job that has ended with this answer."""
    is_own = "webhook_url" not in job.request.overridden
    return Webhook(
        job.prompt_id,
        job.id,
        job.settings,
        "" if is_own else urlsplit(job.settings.webhook_url).netloc,
        job.request.is_public_only("webhook_url"),
        _spool(encode({**answer, "extra": job.request.extra_params})),
    )


def _spool(pieces: list[bytes]) -> Any:
    """A file of the pieces, on disk where it is large and the disk has room."""
    try:
        file = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115  # closed when delivered
        file.writelines(pieces)
        return file
    except OSError:
        return io.BytesIO(b"".join(pieces))


@dataclass(order=True)
class OwedWebhook:
    """A webhook that waits for its next try. They are ordered by the time of it."""

    due: float  # by monotonic()
    number: int
    webhook: Webhook = field(compare=False)
    pauses: list[float] = field(compare=False)  # seconds before each try that is left
    on_end: Callable[[str], None] = field(compare=False)  # takes 'delivered' or 'failed'


class WebhookQueue:
    """Delivers what is owed. A thread belongs to a try: while a webhook waits, it has none.

    A receiver that never answers holds up only what is owed to itself.
    """

    def __init__(self) -> None:
        self._owed: dict[str, list[OwedWebhook]] = {}  # heaps, by receiver
        self._under_way: Counter[str] = Counter()  # tries, by receiver
        self._numbers = count()
        self._changed = Condition()
        start_thread("webhooks", self._run)

    def add(self, webhook: Webhook, on_end: Callable[[str], None]) -> None:
        """Has the webhook posted until its receiver takes or refuses it, or no pause is left."""
        pauses = [float(each) for each in webhook.settings.webhook_retry_pauses.split(",")]
        if not self._is_full(webhook.receiver):
            self._put(OwedWebhook(monotonic(), next(self._numbers), webhook, pauses, on_end))
            return
        log.error("the webhook of job %s is dropped: too many are owed", webhook.job_id)
        on_end("failed")

    def _is_full(self, receiver: str) -> bool:
        """Whether no more can be owed to it: the operator's own has room of its own."""
        with self._changed:
            count_of = {each: len(heap) for each, heap in self._owed.items()}
        own = count_of.pop("", 0)
        if not receiver:
            return own >= MAX_OWED_WEBHOOKS
        is_full = sum(count_of.values()) >= MAX_OWED_WEBHOOKS
        return is_full or count_of.get(receiver, 0) >= MAX_OWED_TO_RECEIVER

    def _put(self, owed: OwedWebhook) -> None:
        with self._changed:
            heappush(self._owed.setdefault(owed.webhook.receiver, []), owed)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            owed = self._next()
            try:
                start_thread("webhook", self._try, owed)
            except JobError:  # no thread is to be had
                self._end_try(owed)
                self._put(replace(owed, due=monotonic() + 1))

    def _next(self) -> OwedWebhook:
        """The webhook that is due first, of a receiver with few tries under way."""
        with self._changed:
            while True:
                ready = [
                    heap
                    for receiver, heap in self._owed.items()
                    if heap and self._under_way[receiver] < self._places(receiver)
                ]
                heap = min(ready, default=[])
                wait = heap[0].due - monotonic() if heap else None
                if wait is not None and wait <= 0:
                    self._under_way[heap[0].webhook.receiver] += 1
                    return heappop(heap)
                self._changed.wait(wait)

    def _places(self, receiver: str) -> int:
        """How many tries it may have at once: when there are many, each receiver has one."""
        tries = self._under_way.total()
        if not receiver or tries < MANY_TRIES:  # no client's receivers keep the operator's waiting
            return MAX_TRIES_OF_RECEIVER
        return 1 if tries < MAX_TRIES else 0

    def _try(self, owed: OwedWebhook) -> None:
        webhook, is_over, trouble = owed.webhook, not owed.pauses, ""
        try:
            with every_error_as(_try_failed):
                post_webhook(webhook)
        except JobError as error:
            is_over, trouble = is_over or error.status == 400, error.message
        finally:
            self._end_try(owed)
        if not trouble:
            owed.on_end("delivered")
        elif is_over:
            log.error("the webhook of job %s was not delivered: %s", webhook.job_id, trouble)
            owed.on_end("failed")
        else:
            pause, *left = owed.pauses
            message = "the webhook of job %s: %s; it is tried again in about %g s"
            log.warning(message, webhook.job_id, trouble, pause)
            due = monotonic() + pause * random.uniform(0.8, 1.2)
            self._put(replace(owed, due=due, pauses=left))

    def _end_try(self, owed: OwedWebhook) -> None:
        with self._changed:
            self._under_way[owed.webhook.receiver] -= 1
            if not self._owed[owed.webhook.receiver] and not self._under_way[owed.webhook.receiver]:
                del self._owed[owed.webhook.receiver], self._under_way[owed.webhook.receiver]
            self._changed.notify()


def _try_failed(error: Exception) -> JobError:
    if isinstance(error, PermissionError):  # the address is not allowed, and will not be
        return bad_request(str(error))
    return JobError(500, "internal_error", f"failed: {describe_error(error)}")


def post_webhook(webhook: Webhook) -> None:
    """One try, signed as the Standard Webhooks specification has it.

    Raises CONNECTION_LOST where another try may succeed, a JobError of 400 where none will.
    """
    settings, timestamp = webhook.settings, str(int(time.time()))
    webhook.body.seek(0, os.SEEK_END)
    size = webhook.body.tell()
    headers = {
        "webhook-id": webhook.id,
        "webhook-timestamp": timestamp,
        "Content-Type": JSON,
        "Content-Length": str(size),
    }
    if settings.webhook_secret:
        start = f"{webhook.id}.{timestamp}.".encode()
        signed = hmac.new(settings.webhook_secret, start, hashlib.sha256)
        for piece in read_pieces(webhook.body):
            signed.update(piece)
        signature = base64.b64encode(signed.digest()).decode()
        headers["webhook-signature"] = f"v1,{signature}"
    # A redirect is no delivery: a signed message goes where it was meant to go, or nowhere.
    with http_exchange(
        settings.webhook_url,
        settings.webhook_timeout,
        read_pieces(webhook.body),
        headers,
        is_public_only=webhook.is_public_only,
        total_timeout=settings.webhook_timeout + size / SLOWEST_SERVER,
    ) as response:
        status = response.status
    if status in (408, 429) or status >= 500:
        raise ConnectionError(f"status {status}")
    if not 200 <= status < 300:
        raise bad_request(f"refused with status {status}")


# Worker ###########################################################################################

CUT_SHORT = "the worker had to stop before the job ended"
CANCEL_SECONDS = 10  # that cancelled jobs get to be answered before the worker exits
NEAR_PLACES = 10  # of the queue's front; who is farther back is told of every tenth place
MAX_RUNS = 3  # of a job whose cached files are gone: a busy ComfyUI may clear its cache late
METRICS = {  # of GET /metrics, each after "pyworker_"
    "jobs_total": "Jobs that ended or were refused, by outcome: completed, or the error's type.",
    "cost_total": "Cost of the jobs that found a place in the queue: 100 each.",
    "jobs_waiting": "Jobs that wait for the GPU.",
    "jobs_running": "Jobs on the GPU: 0 or 1.",
    "queue_seconds": "Time that jobs waited for the GPU.",
    "generation_seconds": "Time that jobs had the GPU.",
    "delivery_seconds": "Time that the delivery of outputs took.",
    "delivered_bytes_total": "Size of the files that were delivered, to S3 or in the answer.",
    "webhooks_total": "Webhooks whose delivery has ended, by outcome: delivered or failed.",
    "comfyui_up": "Whether ComfyUI is in order: 0 or 1.",
}


class Metrics:
    """The numbers of GET /metrics: for each of METRICS, its samples by label or part."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._samples: dict[str, dict[str, float]] = {name: {} for name in METRICS}

    def add(self, name: str, amount: float = 1, part: str = "") -> None:
        """Adds to a sample. part: what follows the metric's name, such as "_sum" or its label."""
        with self._lock:
            samples = self._samples[name]
            samples[part] = samples.get(part, 0) + amount

    def observe(self, name: str, value: float) -> None:
        """Adds a value to a summary."""
        self.add(name, value, "_sum")
        self.add(name, 1, "_count")

    def render(self, **gauges: float) -> str:
        """All of them, and the gauges, in Prometheus' text format."""
        lines = []
        for name, help in METRICS.items():
            kind = "summary" if name.endswith("_seconds") else "gauge"
            kind = "counter" if name.endswith("_total") else kind
            lines.append(f"# HELP pyworker_{name} {help}")
            lines.append(f"# TYPE pyworker_{name} {kind}")
            with self._lock:
                samples = dict(self._samples[name])
            for part, value in (samples or {"": gauges.get(name, 0)}).items():
                lines.append(f"pyworker_{name}{part} {float(value)}")
        return "\n".join([*lines, ""])


def stopping_error(job: Job) -> JobError:
    """What a job without the GPU gets from a worker that stops; a 202 promised an end of it."""
    is_promised = job.request.is_async and job.was_queued
    return JobError(499, "cancelled", CUT_SHORT) if is_promised else unavailable("stopping")


class GpuQueue:
    """The lock around the GPU: the first job has it, the others wait, first ready first served."""

    def __init__(self, settings: Settings) -> None:
        self._max_waiting = settings.max_queue_size
        self._head_start = settings.prompt_head_start
        self._lock = Lock()
        self._is_closed = False
        self._arriving: list[Job] = []
        self.jobs: list[Job] = []

    @contextmanager
    def arriving(self, job: Job) -> Iterator[None]:
        """Has `close` end the job in the block as well: its files are fetched; 503 if many are."""
        with self._lock:
            self._check_room(job, self._arriving)
            self._arriving.append(job)
        try:
            yield
        finally:
            self._arriving.remove(job)

    def _check_room(self, job: Job, others: list[Job]) -> None:
        if self._is_closed:
            raise stopping_error(job)
        # A job that is run again has been counted already.
        if len(others) > self._max_waiting and not job.was_queued:
            raise JobError(
                503,
                "queue_full",
                f"{self._max_waiting} jobs are waiting already; try again later",
            )

    def join(self, job: Job) -> None:
        """Takes a place for the job, to be left with `leave`; 503 where there is none."""
        with self._lock:
            self._check_room(job, self.jobs)
            self.jobs.append(job)
            self._call_first()
        if not job.was_queued:
            job.was_queued = True
            if job.on_accepted:
                job.on_accepted()

    def wait_for_turn(self, job: Job) -> None:
        """Returns when the job is the first; raises the error of `job.abort`."""
        notice, told = MOVED, 0
        while notice is not TURN:
            position = max(1, self.jobs.index(job))
            # Of a job that is run again, notices of its earlier prompt may be left.
            if position != told:
                job.notify("queued", position=position)
            told, notice = position, job.next_notice()
        job.notify("started")

    def leave(self, job: Job) -> None:
        """Gives the job's place back, and the turn to the next one."""
        with self._lock:
            self.jobs.remove(job)
            job.has_turn = False
            job.submitted.set()  # or it never will be
            self._call_first()
            for place, each in enumerate(self.jobs[1:], 1):
                # The others need not wake up for it, nor those far behind for each place.
                if each.on_event and (place <= NEAR_PLACES or place % NEAR_PLACES == 0):
                    each.inbox.put(MOVED)

    def give_head_start(self) -> None:
        """Holds up the last job's history until the next prompt is posted, but not for long.

        Asked for a history first, ComfyUI would have the GPU wait 0.4 ms longer, which costs short
        jobs 5 %.
        """
        for following in self.jobs[:1]:
            following.submitted.wait(self._head_start)

    def _call_first(self) -> None:
        if self.jobs and not self.jobs[0].has_turn:
            self.jobs[0].has_turn = True
            self.jobs[0].inbox.put(TURN)

    def close(self) -> None:
        """Gives every waiting job back and takes no more; the running one goes on."""
        with self._lock:
            self._is_closed = True
            for job in [*self.jobs[1:], *self._arriving]:
                job.abort(stopping_error(job))


class HangUpWatcher:
    """Aborts the job of a client that disconnects, or shuts down its sending side: both look alike.

    It needs Linux' epoll, which tells of them while bytes are unread. Elsewhere jobs run to their
    end.
    """

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}  # by the descriptor of their client's connection
        self._poll = select.epoll() if hasattr(select, "epoll") else None
        if self._poll:
            start_thread("hang-ups", self._listen, self._poll)

    @contextmanager
    def watch(self, job: Job) -> Iterator[None]:
        """Aborts the job in the block when its client goes, unless a webhook is to hear of it."""
        if not self._poll or not job.connection or job.settings.webhook_url:
            yield
            return
        descriptor = job.connection.fileno()
        self._jobs[descriptor] = job
        self._poll.register(descriptor, select.EPOLLRDHUP | select.EPOLLONESHOT)
        try:
            yield
        finally:
            self._poll.unregister(descriptor)
            del self._jobs[descriptor]

    def _listen(self, poll: Any) -> None:
        while True:
            for descriptor, _ in poll.poll():
                job = self._jobs.get(descriptor)
                again = select.poll()  # the descriptor may be another connection's by now
                again.register(descriptor, select.POLLRDHUP)
                if job and again.poll(0):
                    job.abort(JobError(499, "cancelled", "the client closed its connection"))


class Worker:
    """Takes requests to their answers: the one place that knows the order of things."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.api = ComfyUIApi(settings)
        self.runner = PromptRunner(self.api)
        self.metrics = Metrics()
        self._webhooks = WebhookQueue()
        self._queue = GpuQueue(settings)
        self._hang_ups = HangUpWatcher()
        self._modifiers = load_modifiers()
        self._is_stopping = False
        self._started_at = monotonic()
        self._changed = Condition()
        self._under_way = 0  # requests that are not answered yet, and webhooks that are owed

    def process(self, job: Job) -> Answer:
        """Takes a job that was read to its end; returns the HTTP status and the envelope."""
        if not job.request.is_async:
            return self._process_to_end(job)
        # Answered as soon as the job has a place in the queue, else with what kept it from one.
        answers: SimpleQueue[Answer] = SimpleQueue()
        queued = envelope(job)
        queued |= {"status": "queued", "message": "queued; the webhook will tell the result"}
        job.on_accepted = lambda: answers.put((202, queued))
        try:
            self._spawn("job", lambda: answers.put(self._process_to_end(job)))
        except JobError as error:
            return self.end(job, error)
        return answers.get()

    def _process_to_end(self, job: Job) -> Answer:
        try:
            with every_error_as(partial(bug, job)):
                self._prepare(job)
                self._run_with_retries(job)
        except JobError as error:
            return self.end(job, error)
        return self.end(job)

    def end(self, job: Job, error: JobError | None = None) -> Answer:
        """Counts and logs the job, sends its webhook; returns the HTTP status and the envelope."""
        answer = envelope(job, error)
        status, outcome = (error.status, error.type) if error else (200, "completed")
        level = logging.WARNING if error else logging.INFO
        if job.id:
            timings = [f"{name} {answer['timings'][name]}" for name in (*TIMINGS, "total_ms")]
            told = (job.id, outcome, status, answer["message"], ", ".join(timings))
            log.log(level, "job %s %s (%d): %s; %s", *told)
        else:  # of a stranger: nothing of what it sent
            log.log(level, "a request was refused: %s (%d)", outcome, status)
        self._count_job(job, outcome)
        if job.was_queued and job.settings.webhook_url:
            self._owe_webhook(make_webhook(job, answer))
        return status, answer

    # Before the GPU

    def _prepare(self, job: Job) -> None:
        """Builds the workflow, fetches its files; refuses what would fail after the GPU's work."""
        with job.timed("preprocess_ms"):
            self._check_ready()
            self._check_targets(job)
            if job.request.modifier:
                self._build_workflow(job)
            check_prefixes(job)
            self._fetch_inputs(job)
            job.request = replace(job.request, modifications={}, workflow_json={})

    def _check_ready(self) -> None:
        if self.state != "ready":
            self.api.probe()  # what is known may be old, where nobody probes
        if self.state != "ready":
            raise unavailable(self.state, self.api.name)

    def _check_targets(self, job: Job) -> None:
        """400 where outputs or the webhook could not be delivered."""
        request, settings = job.request, job.settings
        if request.is_public_only("s3_endpoint_url"):
            check_public("s3.endpoint_url", settings.s3_endpoint_url, must_resolve=True)
        if request.is_public_only("webhook_url"):  # its name may resolve by the time it is sent
            check_public("webhook.url", settings.webhook_url, must_resolve=False)
        if settings.s3_bucket_name:
            s3_client(settings, "s3_endpoint_url" in request.overridden)

    def _build_workflow(self, job: Job) -> None:
        """Has the request's modifier build the workflow."""
        name, modifiers = job.request.modifier, self._modifiers
        if not modifiers:
            raise bad_request(
                "this worker has no modifiers: modifiers.py is not beside pyworker.py",
                "invalid_modification",
            )
        try:
            job.workflow = read_graph(modifiers.build(name, job.request.modifications, self.api))
        except modifiers.InvalidModification as error:
            message = "; ".join([*job.warnings, str(error)])  # a misspelt field may be the cause
            raise bad_request(message, "invalid_modification", **error.details) from None
        except ValueError as error:  # of read_graph, or the modifier's own
            log.exception("modifier %s", name)
            raise JobError(
                500, "internal_error", f"the modifier {name} built no workflow: {error}"
            ) from None

    def _fetch_inputs(self, job: Job) -> None:
        """Puts the files that the workflow names by URL into ComfyUI, and their names in place."""
        found = []
        for node_id, node in job.workflow.items():
            for name, value in node["inputs"].items():
                if not isinstance(value, str):
                    continue
                if not FILE_SOURCE.match(value) and len(value) <= MAX_FIELD:
                    continue
                choice = self.api.choice_of(node["class_type"], name)
                if choice:
                    check_source(f"{name} of {node['class_type']} (node {node_id})", choice, value)
                if choice and choice != "model":
                    found.append((node_id, name, choice, value))
        if not found:  # as for most jobs: there is nothing to watch the client over
            return
        sources = {source: choice for _, _, choice, source in found}
        if len(sources) > MAX_INPUT_FILES:
            raise bad_request(f"the workflow names more than {MAX_INPUT_FILES} files to fetch")
        job.fetched = monotonic()
        with (
            self._queue.arriving(job),
            self._hang_ups.watch(job),
            no_threads_as_503(),
            ThreadPoolExecutor(PARALLEL_FILES) as pool,
        ):
            # The first error spares those not begun.
            names = pool.map(partial(self._upload_input, job), sources, sources.values())
            stored = dict(zip(sources, names, strict=True))
        job.workflow = dict(job.workflow)  # the request's own stays as it is
        for node_id, name, _, source in found:
            node = job.workflow[node_id]
            job.workflow[node_id] = {**node, "inputs": {**node["inputs"], name: stored[source]}}

    def _upload_input(self, job: Job, source: str, choice: str) -> str:
        file, name = download(job, source, choice)
        try:
            with file:
                began_at, stored = monotonic(), self.api.upload_input(file, name)
                check_pace(job, monotonic() - began_at)  # it is ComfyUI that took this time
                return stored
        except CONNECTION_LOST:  # the job is not queued yet: it can go to another worker
            raise unavailable("unreachable", self.api.name) from None

    # On the GPU, and after

    def _run_with_retries(self, job: Job) -> None:
        """Runs the job and delivers what it made, again where cached files turn out to be gone."""
        for runs_left in reversed(range(MAX_RUNS)):
            try:
                self._run_once(job)
                break
            except Rejected as refused:
                api = self.api
                raise rejection(
                    refused.answer, job.workflow, api.choices, api.missing_nodes
                ) from None
            except JobError as error:
                if error.type != "output_missing" or not may_be_stale(job.history) or not runs_left:
                    raise
                self.api.clear_cache()
                job.prompt_id, job.history, job.outputs = str(uuid4()), {}, []
                job.embedded_bytes = 0
                job.submitted = Event()
        if job.request.wants_file:
            choose_answer_file(job, self.api)

    def _run_once(self, job: Job) -> None:
        with self._hang_ups.watch(job):
            self._queue.join(job)
            try:
                with job.timed("queue_ms"):
                    self._queue.wait_for_turn(job)
                log.info("job %s starts on the GPU", job.id)
                with job.timed("generation_ms"):
                    self.runner.run(job)
            finally:
                self._queue.leave(job)
        with job.timed("postprocess_ms"):
            self._queue.give_head_start()
            self.runner.read_history(job)
            try:
                deliver(job, self.api)
            finally:  # what failed in ComfyUI says more than what failed in delivery
                raise_if_failed(job.history, job.workflow)
        job.notify("progress", node_id=None, node_type=None, value=None, max=None, percent=100.0)

    def _owe_webhook(self, webhook: Webhook) -> None:
        owed = ExitStack()
        owed.enter_context(self.under_way())
        owed.enter_context(webhook.body)

        def on_end(outcome: str) -> None:
            self.metrics.add("webhooks_total", part=f'{{outcome="{outcome}"}}')
            owed.close()

        self._webhooks.add(webhook, on_end)

    def _count_job(self, job: Job, outcome: str) -> None:
        self.metrics.add("jobs_total", part=f'{{outcome="{outcome}"}}')
        if not job.was_queued:
            return
        self.metrics.add("cost_total", COST)
        self.metrics.observe("queue_seconds", job.timings["queue_ms"] / 1000)
        self.metrics.observe("generation_seconds", job.timings["generation_ms"] / 1000)
        self.metrics.observe("delivery_seconds", job.timings["postprocess_ms"] / 1000)
        delivered = [file["size"] for file in job.files if "url" in file or "data" in file]
        if job.answer_file and not delivered:
            delivered = [job.answer_file["size"]]
        self.metrics.add("delivered_bytes_total", sum(delivered))

    # What the platform asks

    @property
    def state(self) -> str:
        """'ready', or why not: 'starting', 'unreachable', 'faulted', 'stopping'."""
        return "stopping" if self._is_stopping else self.api.health.state

    @property
    def modifiers(self) -> list[str]:
        """Their names."""
        return list(self._modifiers.names(self.api)) if self._modifiers else []

    def describe_health(self, is_liveness: bool) -> Answer:
        """The HTTP status and the body of GET /health, or of GET /health/live if is_liveness.

        The latter is 503 only where a restart is needed.
        """
        comfyui = self.api.probe()
        state, jobs = self.state, [job.id for job in self._queue.jobs]
        is_well = not self.api.health.needs_restart if is_liveness else state == "ready"
        return 200 if is_well else 503, {
            "status": state,
            "running": jobs[0] if jobs else None,
            "queued": len(jobs[1:]),
            "cost": COST,
            "modifiers": self.modifiers,
            "comfyui": comfyui,
            "version": __version__,
            "uptime_s": round(monotonic() - self._started_at),
        }

    def render_metrics(self) -> str:
        """The body of GET /metrics."""
        jobs = len(self._queue.jobs)
        return self.metrics.render(
            jobs_waiting=max(0, jobs - 1),
            jobs_running=min(1, jobs),
            comfyui_up=self.api.health.state == "ready",
        )

    # Stopping

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Counts the block among what a stopping worker waits for."""
        with self._changed:
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def _spawn(self, name: str, action: Callable[[], None]) -> None:
        """Runs the action in a thread that a stopping worker waits for."""
        counted = ExitStack()
        counted.enter_context(self.under_way())  # from now on, not from the thread's first step

        def run() -> None:
            with counted:
                action()

        start_thread(name, run)

    def stop(self) -> None:
        """Takes no more jobs, and waits SHUTDOWN_GRACE; then cancels the job on the GPU."""
        self._is_stopping = True
        self._queue.close()
        grace = self.settings.shutdown_grace
        log.info(
            "stopping: %d requests and webhooks under way get %g s (a second signal ends it)",
            self._under_way,
            grace,
        )
        with self._changed:
            if not self._changed.wait_for(lambda: not self._under_way, grace):
                for job in self._queue.jobs[:1]:
                    job.abort(JobError(499, "cancelled", CUT_SHORT))
                    self._changed.wait_for(lambda: not self._under_way, CANCEL_SECONDS)
        log.info("stopped with %d requests and webhooks under way", self._under_way)


def load_modifiers() -> Any:
    """The module modifiers.py beside this file; None where there is none."""
    folder = os.path.dirname(os.path.abspath(__file__))
    if not os.path.exists(os.path.join(folder, "modifiers.py")):
        return None
    import modifiers

    return modifiers


def envelope(job: Job, error: JobError | None = None) -> JsonObject:
    """The JSON of an answer: the contract's fields, filled from the job as it is now."""
    now = time.time()
    timings = {
        "queued_at_ms": round(job.received_at * 1000),
        **{name: round(value) for name, value in job.timings.items()},
        "completed_at_ms": round(now * 1000),
        "total_ms": round((now - job.received_at) * 1000),
    }
    answer = {
        "id": job.id,
        "status": error.envelope_status if error else "completed",
        "message": error.message if error else f"outputs: {len(job.outputs)}",
        "output": job.outputs,
        "seeds": seeds(job.workflow),
        "timings": timings,
        "comfyui_response": _comfyui_response(job),
        "warnings": job.warnings,
    }
    if error:
        answer["error"] = {"type": error.type, "message": error.message, **error.details}
    if key := job.settings.comfy_org_api_key:  # partner nodes are given it, and may show it
        answer = map_strings(answer, lambda text: text.replace(key, "***"))
    return answer


def _comfyui_response(job: Job) -> JsonObject:
    if not job.settings.include_comfyui_response:
        return {}
    said = {name: each for name, each in job.history.items() if name == "prompt"}
    return {**scrub(job.history, own_words(job.workflow)), **said}


# HTTP #############################################################################################

CONNECTION_SECONDS = 30  # that a client may stall, or keep a connection unused
DRAIN_SECONDS = 5  # for a client to see its refusal while it is still sending
RETRY_ACCEPT_SECONDS = 1
GET_METHODS = ["GET", "HEAD"]
ROUTES = {
    "/generate/sync": ["POST"],
    "/health": GET_METHODS,
    "/health/live": GET_METHODS,
    "/ping": GET_METHODS,
    "/metrics": GET_METHODS,
}
REPLACED_EVENTS = ("queued", "progress", "preview")
STATUS_HEADERS = {
    202: {"Preference-Applied": "respond-async"},
    401: {"WWW-Authenticate": "Bearer"},
    503: {"Retry-After": "5"},
}


class Handler(http.server.BaseHTTPRequestHandler):
    """One client connection: routes, checks who may come in, and translates; jobs are Worker's."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = CONNECTION_SECONDS
    disable_nagle_algorithm = True  # a keep-alive client waits 40 ms for each answer otherwise
    wbufsize = 1 << 16  # headers and a small body in one write
    owes_body = False  # there are bytes of the request that were not read

    def __getattr__(self, name: str) -> Callable[[], None]:
        # http.server looks for do_METHOD. All of them come here, so that an unknown method is
        # answered like any other.
        if name.startswith("do_"):
            return self._handle
        raise AttributeError(name)

    def _handle(self) -> None:
        # A head that http.server half understands hides where the next request begins. Other
        # defects are of the body.
        defects = [type(each).__name__ for each in self.headers.defects]
        is_malformed = any("Header" in each for each in defects)
        is_malformed = is_malformed or any(name != name.strip() for name in self.headers)
        lengths = self.headers.get_all("Content-Length", ["0"])
        self.owes_body = is_malformed or lengths != ["0"] or "Transfer-Encoding" in self.headers
        with self.server.worker.under_way():
            try:
                if is_malformed:
                    raise bad_request("a header of the request is malformed")
                self._route()
            except JobError as error:
                self._send_json(*self.server.worker.end(Job(), error))

    def _route(self) -> None:
        worker = self.server.worker
        path = re.sub("^https?://[^/]*", "", self.path).partition("?")[0]
        origin = self.headers.get("Origin")
        # A page in somebody's browser may not use a worker that only this browser can reach.
        if origin and origin.partition("://")[2] != self.headers.get("Host"):
            raise JobError(
                403, "forbidden_origin", "requests of a page from another origin are refused"
            )
        if path not in ROUTES:
            raise JobError(404, "not_found", f"there is nothing here; there is {', '.join(ROUTES)}")
        if self.command not in ROUTES[path]:
            raise JobError(
                405,
                "method_not_allowed",
                f"{path} takes {' or '.join(ROUTES[path])}",
                allow=ROUTES[path],
            )
        if path in ("/health", "/health/live", "/ping"):
            with every_error_as(partial(bug, Job())):
                status, health = worker.describe_health(is_liveness=path == "/health/live")
            if path == "/ping" and health["status"] == "starting":
                self.send_head(204, {"Connection": "close"})  # it may have no Content-Length
            else:
                self._send_json(status, health)
            return
        token, given = worker.settings.auth_token, self.headers.get("Authorization", "")
        if token and not hmac.compare_digest(f"Bearer {token}".encode(), given.encode("latin-1")):
            lack = "wrong" if given.startswith("Bearer ") else "not behind the word Bearer"
            raise JobError(
                401,
                "unauthorized",
                f"the token is {lack if given else 'missing'}: send the worker's"
                " in the header 'Authorization: Bearer <token>'",
            )
        if path == "/metrics":
            body = worker.render_metrics().encode()
            self._send(200, "text/plain; version=0.0.4; charset=utf-8", [body])
        else:
            self._generate(worker)

    def _generate(self, worker: Worker) -> None:
        stream = EventStream(self)
        job = Job(connection=self.connection)
        try:
            self._receive_request(job, worker.settings)
        except JobError as refusal:
            self._send_json(*worker.end(job, refusal))
            return
        if job.request.wants_events:
            job.on_event = stream.send  # it opens at the first event, when the job is queued
        status, answer = worker.process(job)
        if stream.is_open:
            stream.end(answer)
        elif job.answer_file:
            self._send_file(job, job.answer_file)
        else:
            self._send_json(status, answer)

    def _receive_request(self, job: Job, settings: Settings) -> None:
        if self.headers.get("X-Include-ComfyUI-Response") in ("1", "true"):
            settings = replace(settings, include_comfyui_response=True)
        headers = {name: ", ".join(self.headers.get_all(name, [])) for name in ("accept", "prefer")}
        body = self._read_body()
        with every_error_as(partial(bug, job)):
            read_request(job, parse_body(body), headers, settings)

    def _read_body(self) -> bytes:
        lengths = set(self.headers.get_all("Content-Length", []))
        limit = self.server.worker.settings.max_body_bytes
        if not lengths or "Transfer-Encoding" in self.headers:
            raise JobError(
                411, "length_required", "send the body with a Content-Length, not in chunks"
            )
        if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", text := lengths.pop()):
            raise bad_request("Content-Length has to be one number")
        length = int(text)
        if length > limit:
            raise JobError(
                413, "body_too_large", f"the body has {length} bytes; MAX_BODY_BYTES allows {limit}"
            )
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError("the client went away before its request was complete")
        self.owes_body = False
        return body

    def handle_expect_100(self) -> bool:
        """Leaves the 100 to _read_body: the client is to see a refusal before it sends the body."""
        return True

    def _send_json(self, status: int, answer: JsonObject) -> None:
        headers = STATUS_HEADERS.get(status, {})
        if status == 405:
            headers = {"Allow": ", ".join(answer["error"]["allow"])}
        body = [*encode(answer), b"\n"]  # the line's end is for who reads it in a terminal
        self._send(status, JSON, body, headers)

    def _send(
        self, status: int, mimetype: str, body: list[bytes], more: Mapping[str, str] = {}
    ) -> None:
        headers = {"Content-Type": mimetype, "Content-Length": str(sum(map(len, body))), **more}
        if self.owes_body or self.close_connection:
            headers["Connection"] = "close"
        self.send_head(status, headers)
        if self.command != "HEAD":
            self.wfile.writelines(body)
        self.wfile.flush()
        if self.owes_body:
            self._drain()

    def _send_file(self, job: Job, output: Output) -> None:
        api, conversion = self.server.worker.api, job.answer_conversion
        name = re.sub(r"[^ !#-\[\]-~]", "_", delivered_name(output, conversion))
        with ExitStack() as stack:

            def open_file() -> tuple[Any, bytes]:
                file = stack.enter_context(api.view(output, conversion))
                return file, file.read(CHUNK_BYTES)

            try:
                file, start = api.retry_while_away(job, open_file)
            except JobError as error:
                self._send_json(error.status, envelope(job, error))
                return
            headers = {
                "Content-Type": output["mimetype"],
                "Content-Length": str(output["size"]),
                "Content-Disposition": f'inline; filename="{name}"',
                "X-Request-Id": str(job.id),
                "X-Warnings": str(len(job.warnings)),
            }
            seeds_json = json.dumps(seeds(job.workflow), separators=(",", ":"))
            if len(seeds_json) <= MAX_MESSAGE:  # proxies refuse long heads
                headers["X-Seeds"] = seeds_json
            self.send_head(200, headers)
            try:
                self.wfile.write(start)
                shutil.copyfileobj(file, self.wfile)
                self.wfile.flush()
            except CONNECTION_LOST as error:  # to the client, or to ComfyUI
                log.warning("job %s: its file was cut short: %s", job.id, describe_error(error))
                raise

    def send_head(self, status: int, headers: Mapping[str, str]) -> None:
        """Sends everything before the body."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _drain(self) -> None:
        """Reads on for a while after a refusal.

        Closing a connection with unread bytes would reset it, and the answer would be lost.
        """
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(DRAIN_SECONDS)
        deadline = monotonic() + DRAIN_SECONDS
        while self.rfile.read1(CHUNK_BYTES) and monotonic() < deadline:
            pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers what http.server itself refuses, a malformed head, like every other refusal."""
        self.close_connection = self.owes_body = True
        # http.server answers a line that it cannot read without a head.
        self.request_version = self.protocol_version
        error = JobError(
            code,
            "invalid_request",
            f"the request cannot be read: {message or self.responses[code][0]}",
        )
        self._send_json(*self.server.worker.end(Job(), error))

    def version_string(self) -> str:
        """The Server header."""
        return f"ComfyUI-PyWorker/{__version__}"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the log has a line per job; requests are a proxy's to log."""


class EventStream:
    """Server-sent events on a connection, written by a thread of their own.

    Whoever sends an event waits for no client. What a slow one has not read is kept, but for the
    events that the next of their kind makes obsolete. The stream opens with the first event, so
    that refusals stay ordinary answers.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._keep_alive_seconds = handler.server.worker.settings.event_keep_alive
        self._comment_at = monotonic() + self._keep_alive_seconds
        self._unsent: list[tuple[str, JsonObject]] = []
        self._changed = Condition()
        self._ended = Event()
        self.is_open = False

    def send(self, event: str, data: JsonObject) -> None:
        """Has one event sent; after a failed write, it is dropped."""
        if not self.is_open:
            start_thread("events", self._write)
            self.is_open = self._handler.close_connection = True
        with self._changed:
            if event in REPLACED_EVENTS:
                self._unsent = [each for each in self._unsent if each[0] != event]
            if not self._ended.is_set():
                self._unsent.append((event, data))
            self._changed.notify()

    def end(self, answer: JsonObject) -> None:
        """Returns when the answer is sent as the last event, or the client is gone."""
        self.send("result", answer)
        self._ended.wait()

    def _write(self) -> None:
        """Writes until the result is sent."""
        headers = {
            "Content-Type": EVENT_STREAM,
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",  # nginx would collect the events
            "Connection": "close",
        }
        event = ""
        try:
            self._handler.send_head(200, headers)
            while event != "result":
                event, pieces = self._next()
                self._handler.wfile.writelines(pieces)
                self._handler.wfile.flush()
        except CONNECTION_LOST:
            pass  # the client has stopped reading, or is gone
        finally:
            with self._changed:
                self._unsent.clear()
                self._ended.set()

    def _next(self) -> tuple[str, list[bytes]]:
        """The next event and its bytes, or a comment: proxies end streams that are silent."""
        with self._changed:
            left = self._comment_at - monotonic()
            if left <= 0 or not self._changed.wait_for(lambda: self._unsent, left):
                self._comment_at = monotonic() + self._keep_alive_seconds
                return "", [b": the job is under way\n\n"]
            event, data = self._unsent.pop(0)
        return event, [f"event: {event}\ndata: ".encode(), *encode(data), b"\n\n"]


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens, with a thread per connection."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024  # connections that arrive together; the kernel may allow fewer

    def __init__(self, worker: Worker, port: int) -> None:
        self.worker = worker
        self._has_closed = Event()
        host = worker.settings.worker_host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            message = f"cannot listen on {host} port {port} (see --port): {describe_error(error)}"
            raise ValueError(message) from None

    def server_bind(self) -> None:
        """Binds the address; :: stands for those of IPv4 as well, whatever the system's default."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def stop(self) -> None:
        """Returns once the worker has come to its end."""
        self.worker.stop()
        self.shutdown()

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next connection; where the system has no more of them, it waits for one to end."""
        self._has_closed.clear()
        try:
            return super().get_request()
        except OSError:
            self._has_closed.wait(RETRY_ACCEPT_SECONDS)
            raise  # which the caller takes for a client that has gone

    def process_request(self, request: Any, client_address: Any) -> None:
        """Has a thread handle the connection; where the system has none left, it is refused."""
        try:
            with no_threads_as_503():
                super().process_request(request, client_address)
        except JobError as error:
            body = b"".join(encode(self.worker.end(Job(), error)[1]))
            head = (
                f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: {JSON}\r\nRetry-After: 5\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            with suppress(OSError):
                request.send(head.encode() + body, socket.MSG_DONTWAIT)
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Closes the connection."""
        super().shutdown_request(request)
        self._has_closed.set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs a bug; clients that go away are no news."""
        if not isinstance(sys.exc_info()[1], CONNECTION_LOST):
            log.exception("a connection met a bug of the worker")


# Command line #####################################################################################


MAX_UNWRITTEN_LINES = 10000
FLUSH_SECONDS = 2


class LogFormatter(logging.Formatter):
    """Keeps out of the log what strangers' words could do to it.

    That is: control codes, endless lines, and the words that engines look for.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        if isinstance(record.args, tuple):
            record.args = tuple(
                each if isinstance(each, (int, float)) else escape(each) for each in record.args
            )
        text = super().format(record)
        if not str(record.msg).startswith("WORKER_"):
            text = re.sub("WORKER_(?=READY|ERROR)", "WORKER-", text)
        return "\n".join(cut(line, MAX_LOG_LINE) for line in text.split("\n"))

    def formatException(self, ei: Any) -> str:
        """The traceback as text."""
        return "\n".join(escape(line) for line in super().formatException(ei).split("\n"))


def escape(value: Any) -> str:
    """The value's text, cut, in printable ASCII, without the secrets of URLs."""
    return without_secrets(cut(str(value))).encode("unicode_escape").decode()


class LogHandler(logging.Handler):
    """Has a thread of its own write to stderr: a pipe that nobody reads costs lines, and no job."""

    def __init__(self) -> None:
        super().__init__()
        self._unwritten: Queue[str | Event] = Queue(MAX_UNWRITTEN_LINES)
        start_thread("log", self._write)

    def emit(self, record: logging.LogRecord) -> None:
        """Takes the record, if there is room for it."""
        with suppress(Full):
            self._unwritten.put_nowait(self.format(record))

    def flush(self) -> None:
        """Returns when all is written, or cannot be."""
        written = Event()
        with suppress(Full):
            self._unwritten.put_nowait(written)
            written.wait(FLUSH_SECONDS)

    def _write(self) -> None:
        for each in iter(self._unwritten.get, None):
            if isinstance(each, Event):
                each.set()
                continue
            with suppress(OSError):  # nobody reads it any more
                print(each, file=sys.stderr, flush=True)


def main() -> None:
    """Runs the worker until SIGTERM or SIGINT stops it; a second signal ends it at once."""
    given = vars(_parser().parse_args())
    handler = _set_up_log()
    try:
        settings = Settings.read({**os.environ, **given})
        server = Server(Worker(settings), settings.port)
        if settings.port_health not in (0, settings.port):
            second = Server(server.worker, settings.port_health)
            start_thread("health", second.serve_forever)
    except ValueError as error:
        sys.exit(f"WORKER_ERROR: {error}")
    for number in (SIGTERM, SIGINT):
        signal(number, partial(_stop, server))
    _fit_the_system()
    log.info("ComfyUI PyWorker %s listens on http://%s:%s", __version__, *server.server_address[:2])
    start_thread("warnings", _warn, server.worker.api)
    log.info(
        "modifiers: %s",
        ", ".join(server.worker.modifiers) or "none, as modifiers.py is not beside pyworker.py",
    )
    name = server.worker.api.name
    log.info("waiting for %s; to start one: python main.py in its folder", name)
    start_thread("websocket", server.worker.runner.listen)
    server.serve_forever()
    handler.flush()  # logging.shutdown would wait for a pipe that nobody reads
    os._exit(0)  # an upload that hangs, in a thread of its pool, would be waited for


def _parser() -> argparse.ArgumentParser:
    listed = []
    for each in fields(Settings):
        if each.name in SETTING_GROUPS:
            listed.append(f"\n{SETTING_GROUPS[each.name]}:")
        default = f" [{each.default}]" if each.default else ""
        listed.append(f"  {each.name.upper():26}{each.metadata['help']}{default}")
    parser = argparse.ArgumentParser(
        description="Turns a ComfyUI into an HTTP API: POST /generate/sync runs a workflow.",
        epilog="\n".join(["environment variables, with their defaults:", *listed]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--host", dest="WORKER_HOST", help="address to listen on, over WORKER_HOST")
    parser.add_argument("--port", dest="PORT", help="port to listen on, over PORT")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _set_up_log() -> LogHandler:
    handler = LogHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    log.setLevel(logging.INFO)  # and the libraries at their warnings
    # A modifiers.py that cannot be imported ends here, too.
    sys.excepthook = lambda *error: log.critical(
        "WORKER_ERROR: the worker cannot start: %s", error[1], exc_info=error
    )
    return handler


def _warn(api: ComfyUIApi) -> None:
    """Warns of settings that are valid but probably not meant."""
    settings, modifiers = api.settings, load_modifiers()
    if settings.worker_host not in ("127.0.0.1", "::1", "localhost") and not settings.auth_token:
        log.warning(
            "AUTH_TOKEN is not set: whoever reaches %s can use the GPU", settings.worker_host
        )
    for name in ("s3_access_key_id", "s3_endpoint_url", "s3_public_url"):
        if getattr(settings, name) and not settings.s3_bucket_name:
            message = "%s is set but no S3_BUCKET_NAME: S3 is off for requests that name no bucket"
            log.warning(message, name.upper())
    for name in ("comfyui_install_path", "workflow_file", "workflows_dir"):
        path = getattr(settings, name)
        if path and not os.path.exists(path):
            log.warning("%s leads nowhere: %s", name.upper(), path)
    for fault in modifiers.file_faults(api) if modifiers else ():
        log.warning("%s; jobs that ask for it will be refused", fault)
    if settings.s3_bucket_name:
        try:
            s3_client(settings)  # which the first job need not make then
        except JobError as error:
            log.warning("jobs that use S3 will be refused: %s", error)


def _fit_the_system() -> None:
    """Makes room for many connections and large bodies, where the system lets it."""
    # Linux' usual limit of 1024 files is soon reached.
    with suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # A C library that is not glibc has no mallopt.
    with suppress(ImportError, AttributeError, OSError, TypeError):
        import ctypes

        # M_MMAP_THRESHOLD: what takes more than this is given back at once. Left alone, glibc
        # raises it to the largest body so far, and each thread keeps the memory of one: 40 owed
        # webhooks of 22 MB held 620 MB instead of 33.
        ctypes.CDLL(None).mallopt(-3, 1 << 20)


def _stop(server: Server, number: int, frame: Any) -> None:
    for each in (SIGTERM, SIGINT):
        signal(each, lambda *_: os._exit(1))
    start_thread("stop", server.stop)


if __name__ == "__main__":
    main()
