#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["boto3>=1.36", "websocket-client>=1.8"]
# ///
"""ComfyUI PyWorker: turns a GPU box with ComfyUI into an HTTP API, in one file.

    POST /generate/sync   runs one ComfyUI workflow and answers when its outputs are delivered
    GET  /health          tells the platform whether the worker is in order

A request becomes a `Job`, waits in the `Line` for the one GPU, runs in ComfyUI, and its outputs are delivered into the
answer, into S3 and to a webhook. ComfyUI is spoken to over HTTP; one websocket connection, kept for the worker's life
and always drained, tells when a prompt ends. What ComfyUI's history says is authoritative: the websocket only says when
to look. When the connection is lost, history and queue are looked up until the prompt has ended, and a prompt that
ComfyUI lost with it is sent again, once.

Each HTTP connection has a thread; one lock around submit-to-finished keeps the GPU to one job, and everything else
(checking, uploading, webhooks) runs outside it. MIT licence.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import functools
import hmac
import http.client
import http.server
import importlib
import json
import logging
import os
import pathlib
import queue
import random
import re
import select
import signal
import socket
import socketserver
import ssl
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

try:
    import websocket
except ImportError:
    sys.exit("pyworker: the package websocket-client is missing; install it with: pip install websocket-client")

__version__ = "1.0.0"
COST = 100  # of each request: the static figure that an autoscaler is given

log = logging.getLogger("pyworker")

Graph = dict[str, dict[str, Any]]  # ComfyUI's API format: node id -> {"class_type": …, "inputs": {…}}
Output = dict[str, Any]  # one entry of an answer's "output"
Message = dict[str, Any]  # one websocket message: {"type": …, "data": {…}}
Url = str
SigningKey = bytes  # of a webhook

# What a connection that cannot be made, or breaks, raises in urllib, http.client and socket alike.
CONNECTION_LOST = (OSError, http.client.HTTPException)


# Settings #############################################################################################################


def _setting(default: Any, text: str, low: float = 0, high: float = float("inf")) -> Any:
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True, repr=False)  # it holds secrets
class Settings:
    """The environment, read once. A field's variable is its name in upper case; durations are in seconds."""

    worker_host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8000, "port to listen on", high=65535)
    comfyui_api_base: Url = _setting("http://127.0.0.1:8188", "where ComfyUI answers")
    comfyui_install_path: str = _setting("", "ComfyUI's folder; set, an answer shows each file's local_path")
    comfyui_return_timeout: float = _setting(120.0, "seconds that a ComfyUI gone under a job may stay away", high=10**7)
    auth_token: str = _setting("", "what clients have to send as 'Authorization: Bearer …'")
    max_queue_size: int = _setting(100, "jobs that may wait for the GPU; the next one gets 503")
    max_body_bytes: int = _setting(64 << 20, "largest request body")
    output_base64_max_bytes: int = _setting(64 << 20, "largest file that an answer carries as base64")
    job_timeout: float = _setting(0.0, "seconds that a job may take on the GPU; 0: no limit", high=10**7)
    shutdown_grace: float = _setting(300.0, "seconds that SIGTERM gives the running job and owed webhooks", high=10**7)
    s3_access_key_id: str = _setting("", "S3 key; with neither key set, boto3's own chain is used")
    s3_secret_access_key: str = _setting("", "its secret")
    s3_bucket_name: str = _setting("", "bucket; naming one turns S3 on")
    s3_endpoint_url: Url = _setting("", "S3 server; empty: AWS")
    s3_region: str = _setting("", "its region")
    s3_prefix: str = _setting("", "put before every S3 key")
    s3_connect_timeout: float = _setting(60.0, "seconds until a connection to S3 counts as failed", 0.001, 3600)
    s3_connect_attempts: int = _setting(3, "tries of each S3 request, the first one included", low=1)
    s3_url_expires: int = _setting(604800, "seconds that a presigned URL is valid", low=1, high=604800)
    webhook_url: Url = _setting("", "gets a POST for every job that ends")
    webhook_timeout: float = _setting(30.0, "seconds until a webhook's receiver counts as silent", 0.001, 3600)
    webhook_secret: SigningKey = _setting(b"", "signs what goes to WEBHOOK_URL: whsec_ and base64")
    default_checkpoint: str = _setting("", "Text2Image's checkpoint; empty: the first one that ComfyUI lists")
    include_comfyui_response: bool = _setting(False, "put ComfyUI's history entry into every answer")
    comfy_org_api_key: str = _setting("", "passed on to ComfyUI for its partner nodes")

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Reads and checks the environment; ValueError names the variable at fault, never a secret's value."""
        values = {}
        for each in fields(cls):
            variable = each.name.upper()
            if text := environ.get(variable, "").strip():
                values[each.name] = value = named(variable, ENVIRONMENT_READERS[str(each.type)], _from_text(each, text))
                low, high = each.metadata["low"], each.metadata["high"]
                if isinstance(value, (int, float)) and not low <= value <= high:  # not for NaN either
                    raise ValueError(
                        f"{variable} has to be {low:g} " + ("or more" if high == float("inf") else f"to {high}")
                    )
        settings = cls(**values)
        if bool(settings.s3_access_key_id) != bool(settings.s3_secret_access_key):
            raise ValueError("S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY come in pairs: set both or neither")
        return settings


def _from_text(setting: Field[Any], text: str) -> Any:
    """A number or a truth value as JSON has it; the text itself where it is none, for the reader to refuse."""
    with contextlib.suppress(ValueError):
        return json.loads(text.lower()) if setting.type in ("int", "float", "bool") else text
    return text


def named(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    """What `read` makes of the value; its ValueError gets the name before it."""
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _typed(kind: Any, words: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"has to be {words}")
        return value

    return read


def read_plain(text: Any) -> str:
    """What can go into an HTTP header."""
    if not isinstance(text, str) or not re.fullmatch(r"[!-~]+", text):
        raise ValueError("has to be a string in plain ASCII, without spaces")
    return text


def read_url(text: Any) -> Url:
    """An http(s) URL; http.client refuses spaces, control and non-ASCII characters when it is too late to say so."""
    with contextlib.suppress(ValueError):  # of a port that is none, or a bracket without its twin
        parts = urllib.parse.urlsplit(text if isinstance(text, str) else "")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and re.fullmatch(r"[!-~]+", text):
            return str(text)
    raise ValueError("has to be an http:// or https:// URL in plain ASCII, such as https://example.com/path")


def read_signing_key(secret: Any) -> SigningKey:
    """The bytes of a Standard Webhooks secret."""
    with contextlib.suppress(ValueError):
        key = base64.b64decode(secret[6:], validate=True) if isinstance(secret, str) else b""
        if key and secret.startswith("whsec_"):
            return key
    raise ValueError("has to be 'whsec_' and base64, as the Standard Webhooks specification has it")


_string = _typed(str, "a string")
_flag = _typed(bool, "true or false")
_number = _typed((int, float), "a number")
ENVIRONMENT_READERS: dict[str, Callable[[Any], Any]] = {
    "str": _string,
    "int": _typed(int, "a whole number"),
    "float": _number,
    "bool": _flag,
    "Url": read_url,
    "SigningKey": read_signing_key,
}


# Errors ###############################################################################################################


class JobError(Exception):
    """A job's failure, raised where it is known and answered in one place.

    status: of HTTP. type: one of the contract's, for programs. message: one sentence that a person can act on.
    details: what else goes into the answer's `error`.
    """

    def __init__(self, status: int, type: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.status, self.type, self.message, self.details = status, type, message, details

    @property
    def outcome(self) -> str:
        """The envelope's `status`."""
        return self.type if self.type in ("timeout", "cancelled") else "failed"


# Job ##################################################################################################################

RANDOM_INT = "__RANDOM_INT__"
MAX_JSON_DEPTH = 100  # ComfyUI's own graphs nest 5 deep; deeper ones only serve to exhaust the stack
TIMINGS = ("queue_ms", "preprocess_ms", "generation_ms", "postprocess_ms")


# Where a job's files go; both keys are empty where boto3's own chain (instance role, shared file) is to serve.
S3Target = collections.namedtuple("S3Target", "access_key_id secret_access_key endpoint_url bucket_name region")
# Who is told when a job ends; timeout in seconds, and without a key (bytes) the message is not signed.
Webhook = collections.namedtuple("Webhook", "url extra_params timeout key")


@dataclass(repr=False)
class Job:
    """A request on its way to its answer: checked, so that nothing downstream has to check it again."""

    request_id: str | None = None  # None where the body could not be read
    modifier: str = ""
    modifications: dict[str, Any] = field(default_factory=dict)
    workflow: Graph = field(default_factory=dict)  # empty until the modifier has built it
    s3: S3Target | None = None
    webhook: Webhook | None = None
    as_base64: bool = False
    comfy_org_api_key: str = ""
    include_comfyui_response: bool = False
    connection: socket.socket | None = None  # of its client
    prompt_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    received_at: float = field(default_factory=time.time)
    timings: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TIMINGS, 0.0))  # milliseconds
    # what a waiting or running job has to hear: its turn, ComfyUI's messages, a lost connection, an order to stop
    inbox: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)
    was_accepted: bool = False  # its request was in order and it found a place in the queue: its webhook is owed
    entry: dict[str, Any] = field(default_factory=dict)  # of ComfyUI's history
    outputs: list[Output] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the milliseconds that the block took to the timing of that name."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.timings[name] += (time.monotonic() - start) * 1000

    def stop(self, error: JobError) -> None:
        """Ends a waiting or running job with that error; a running prompt is interrupted."""
        self.inbox.put({"type": "stop", "error": error})

    def next_message(self, seconds: float | None = None) -> Message | None:
        """The next message for the job, None when there was none for so long; raises the error of `stop`."""
        try:
            message = self.inbox.get(timeout=seconds)
        except queue.Empty:
            return None
        if "error" in message:
            raise message["error"]
        return message


def parse_input(body: bytes) -> dict[str, Any]:
    """What a request says of its job: {"input": {…}}, or that in the serverless envelope's "payload"; 400 otherwise."""
    try:
        value = json.loads(body, parse_constant=_finite, parse_float=_finite)
        _check(value, MAX_JSON_DEPTH)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise invalid(f"the body is not JSON that can be read: {error}") from None
    if isinstance(value, dict) and isinstance(value.get("payload"), dict):
        value = value["payload"]
    if not isinstance(value, dict) or not isinstance(value.get("input"), dict):
        raise invalid('the body has to be a JSON object with the job in "input": {"input": {"workflow_json": {…}}}')
    return dict(value["input"])


def _finite(text: str) -> float:
    if not float("-inf") < float(text) < float("inf"):  # as NaN is not either
        raise ValueError(f"{text:.20} is no number that JSON has")
    return float(text)


def _check(value: Any, left: int) -> None:
    """Refuses what JSON allows and nobody can pass on: endless nesting, halves of surrogate pairs."""
    if not left:
        raise RecursionError(f"it is nested more than {MAX_JSON_DEPTH} deep")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, (dict, list)):
        for each in (*value, *value.values()) if isinstance(value, dict) else value:
            _check(each, left - 1)


def invalid(message: str, type: str = "invalid_request", **details: Any) -> JobError:
    """A request that is not in order."""
    return JobError(400, type, message, **details)


def read_request_id(value: Any) -> str:
    """The request's own id, which becomes a part of an S3 key."""
    if not isinstance(value, str) or not re.fullmatch(r"(?!\.)[A-Za-z0-9._-]{1,128}", value):
        raise ValueError("has to be a string of 1 to 128 characters out of A-Z a-z 0-9 . _ - and not start with a dot")
    return value


def read_graph(graph: Any) -> Graph:
    """The graph, random numbers filled in, if ComfyUI can be asked to run it: it answers some of the rest with 500."""
    if not isinstance(graph, dict):
        raise ValueError("has to be an object of nodes in ComfyUI's API format")
    if isinstance(graph.get("nodes"), list):
        message = "the workflow is in the editor's own format; in ComfyUI, use Workflow > Export (API) and send that"
        raise invalid(message, "editor_format")
    for node_id, node in graph.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str):
            raise ValueError(f"is not in API format: node {node_id!r} has to be an object with a class_type (a string)")
        if not isinstance(node.get("inputs"), dict):
            raise ValueError(f"is not in API format: node {node_id!r} has to have inputs (an object)")
    return {node_id: fill_random(node) for node_id, node in graph.items()}


def fill_random(value: Any) -> Any:
    """A copy of the value, its placeholders replaced by fresh integers in 0 … 2³²-1, as text where they are in text."""
    if isinstance(value, dict):
        return {name: fill_random(each) for name, each in value.items()}
    if isinstance(value, list):
        return [fill_random(each) for each in value]
    if value == RANDOM_INT:
        return random.getrandbits(32)
    if isinstance(value, str) and RANDOM_INT in value:
        return re.sub(RANDOM_INT, lambda _: str(random.getrandbits(32)), value)
    return value


_object = _typed(dict, "an object")
Table = dict[str, Callable[[Any], Any]]
INPUT_FIELDS: Table = {
    "request_id": read_request_id,
    "modifier": _string,
    "modifications": lambda value: fill_random(_object(value)),
    "workflow_json": read_graph,
    "s3": _object,
    "webhook": _object,
    "return_outputs_as_base64": _flag,
    "comfy_org_api_key": _string,
}
S3_FIELDS: Table = {name: read_url if name == "endpoint_url" else read_plain for name in S3Target._fields}
WEBHOOK_FIELDS: Table = {"url": read_url, "extra_params": _object, "secret": read_signing_key, "timeout": _number}


def read_job(job: Job, given: dict[str, Any], settings: Settings) -> None:
    """Fills the job with what a request's `input` asks for, request over environment; 400 where a rule is broken."""
    job.request_id = str(uuid.uuid4())
    job.request_id = _read_fields(Job(), "", given, {"request_id": read_request_id}).get("request_id", job.request_id)
    fields = _read_fields(job, "", given, INPUT_FIELDS)
    s3 = _read_fields(job, "s3.", fields.get("s3", {}), S3_FIELDS)
    webhook = _read_fields(job, "webhook.", fields.get("webhook", {}), WEBHOOK_FIELDS)
    if ("modifier" in fields) == ("workflow_json" in fields):
        given_are = "both" if "modifier" in fields else "neither"
        raise invalid(f"give exactly one of modifier and workflow_json in input; {given_are} is given")
    if "modifications" in fields and "modifier" not in fields:
        raise invalid("modifications go with a modifier; with workflow_json, put the values into the workflow itself")
    job.modifier, job.modifications = fields.get("modifier", ""), fields.get("modifications", {})
    job.workflow = fields.get("workflow_json", {})
    job.comfy_org_api_key = fields.get("comfy_org_api_key", settings.comfy_org_api_key)
    job.s3 = _read_s3(s3, settings)
    job.webhook = _read_webhook(webhook, settings)
    if webhook and not job.webhook:
        job.warnings.append("no webhook is sent: neither webhook.url nor WEBHOOK_URL is set")
    job.as_base64 = fields.get("return_outputs_as_base64", job.s3 is None)


def _read_fields(job: Job, prefix: str, raw: dict[str, Any], table: Table) -> dict[str, Any]:
    """The fields that are given, each read. Blank ones count as absent: clients send whole templates with blanks."""
    given = {name: value for name, value in raw.items() if value not in ("", {}, None)}
    unknown = [name for name in given if name not in table]
    job.warnings += [f"{prefix}{name:.50} is no field of a request; it was ignored" for name in unknown]
    try:
        return {name: named(prefix + name, table[name], given[name]) for name in table if name in given}
    except ValueError as error:
        raise invalid(str(error)) from None


def _read_s3(given: dict[str, Any], settings: Settings) -> S3Target | None:
    """Request over environment, field by field, except that keys come in pairs and stay with their endpoint."""
    own_keys = "access_key_id" in given
    if own_keys != ("secret_access_key" in given):
        raise invalid("s3.access_key_id and s3.secret_access_key come in pairs: give both or neither")
    target = S3Target(**{name: given.get(name) or getattr(settings, f"s3_{name}") for name in S3_FIELDS})
    if given and not target.bucket_name:
        raise invalid("s3 needs a bucket: give s3.bucket_name, or set S3_BUCKET_NAME")
    # the operator's credentials never go to an endpoint that a request chose
    if target.endpoint_url.rstrip("/") != settings.s3_endpoint_url.rstrip("/") and not own_keys:
        raise invalid("s3.endpoint_url needs its own s3.access_key_id and s3.secret_access_key")
    if not target.access_key_id and target.bucket_name != settings.s3_bucket_name:
        raise invalid("s3.bucket_name needs s3.access_key_id and s3.secret_access_key: this worker has no keys for it")
    return target if target.bucket_name else None


def _read_webhook(given: dict[str, Any], settings: Settings) -> Webhook | None:
    url = given.get("url", settings.webhook_url)
    timeout = given.get("timeout", settings.webhook_timeout)
    if not 0 < timeout <= 3600:
        raise invalid("webhook.timeout has to be more than 0 and at most 3600 seconds")
    # the operator's secret signs only what goes to the operator's receiver
    key = given.get("secret", settings.webhook_secret if url == settings.webhook_url else b"")
    return Webhook(url, given.get("extra_params", {}), timeout, key) if url else None


def seeds(graph: Graph) -> dict[str, int]:
    """Each node's literal seed, as it is run, by node id."""
    found = {id: node["inputs"].get("seed", node["inputs"].get("noise_seed")) for id, node in graph.items()}
    return {id: seed for id, seed in found.items() if isinstance(seed, int)}


# ComfyUI ##############################################################################################################

OLDEST_COMFYUI = (0, 3, 45)  # July 2025: the first one that lets the caller choose the prompt id
HTTP_SECONDS = 60  # for an answer of ComfyUI, which lists huge model folders while it checks a graph
PROBE_SECONDS = 0.8  # below the one second that Kubernetes grants a probe
PROBE_EVERY_SECONDS = 1
FLAP_SECONDS = 10  # a failure shorter than this is not worth taking a worker out of rotation
RECONNECT_SECONDS = 0.5
SILENCE_SECONDS = 10  # without a message for so long, history and queue are looked up
LOOK_UP_SECONDS = 1  # between look-ups of a prompt that no connection tells about
INTERRUPT_SECONDS = 10  # for an interrupted prompt to leave the GPU: ComfyUI acts between nodes and sampler steps

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ComfyUI:
    """Everything that speaks to ComfyUI. One prompt is run at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = settings.comfyui_api_base.rstrip("/")
        self._socket: websocket.WebSocket | None = None
        self._client_id = ""  # of the websocket's connection; empty while there is none
        self._job: Job | None = None
        self._was_up = False
        self._failing_since = 0.0  # 0: it is in order
        self._stats: dict[str, Any] = {}
        self._probed_at = float("-inf")
        self._probing = threading.Lock()

    # what the platform asks

    def state(self) -> str:
        """'starting', 'ready' or 'unreachable', from what is known: nothing is asked."""
        if not self._was_up:
            return "starting"
        # a job that runs on a live websocket is proof enough
        is_failing = self._failing_since and not (self._job and self._client_id)
        return "unreachable" if is_failing and time.monotonic() - self._failing_since > FLAP_SECONDS else "ready"

    def describe(self) -> dict[str, Any]:
        """url, version, device and vram_free (bytes), asked for once a second at most, for all who probe."""
        self._probe()
        device = (self._stats.get("devices") or [{}])[0]
        version = self._stats.get("system", {}).get("comfyui_version")
        return {"url": self.url, "version": version, "device": device.get("name"), "vram_free": device.get("vram_free")}

    def _probe(self) -> None:
        with self._probing:
            if time.monotonic() - self._probed_at < PROBE_EVERY_SECONDS:
                return
            try:
                self._stats = self._get("/system_stats", PROBE_SECONDS)
                self._failing_since = 0 if self._client_id else self._failing_since
            except (*CONNECTION_LOST, JobError):
                self._failing_since = self._failing_since or time.monotonic()
            self._probed_at = time.monotonic()

    def models(self, folder: str) -> list[str]:
        """The model files that ComfyUI lists in that folder: 'checkpoints', 'loras', …"""
        return list(self._get(f"/models/{urllib.parse.quote(folder, safe='')}"))

    def clear_cache(self) -> None:
        """Has ComfyUI forget what it has made, and unload its models."""
        self._exchange("/free", {"free_memory": True})

    # the websocket

    def listen(self) -> None:
        """Keeps the websocket connected and drained, for ever."""
        pause = threading.Event()
        while True:
            try:
                self._follow()
            except Exception as error:  # whatever a server sends, somebody has to listen to the next one
                if self._client_id:
                    log.warning("lost the connection to ComfyUI: %s", error)
                self._client_id = ""
                self._failing_since = self._failing_since or time.monotonic()
                self._tell_job({"type": "connection_lost"})
            pause.wait(RECONNECT_SECONDS)  # nobody tells when a server comes up

    def _follow(self) -> None:
        with contextlib.closing(self._connect()) as connection:
            for frame in iter(connection.recv, ""):
                message = json.loads(frame) if isinstance(frame, str) else {}  # bytes are a preview
                about = message.get("data") if isinstance(message, dict) else None
                if isinstance(about, dict):  # custom nodes send what they like
                    self._tell_job(message, about.get("prompt_id", ""))
        raise ConnectionError("ComfyUI closed the websocket")

    def _connect(self) -> websocket.WebSocket:
        """Opens a connection with an id of its own: ComfyUI can silence a second one with the id of a lost first."""
        self._stats = self._get("/system_stats")
        client_id = uuid.uuid4().hex
        url = urllib.parse.urlsplit(self.url)
        raw = socket.create_connection((url.hostname, url.port or {"http": 80, "https": 443}[url.scheme]), HTTP_SECONDS)
        if url.scheme == "https":
            raw = ssl.create_default_context().wrap_socket(raw, server_hostname=url.hostname)
        # websocket-client takes a proxy from the environment unless it is handed a connected socket
        address = f"ws{self.url[4:]}/ws?clientId={client_id}"
        self._socket = websocket.create_connection(address, socket=raw, skip_utf8_validation=True, suppress_origin=True)
        self._socket.recv()  # ComfyUI knows the client id once it has sent its first status
        self._socket.settimeout(None)
        self._client_id, self._was_up = client_id, True
        self._failing_since = 0
        self._tell_job({"type": "connected"})
        self._announce()
        return self._socket

    def _announce(self) -> None:
        about = self.describe()
        log.info("connected to ComfyUI %s on %s at %s", about["version"], about["device"], self.url)
        if [int(part) for part in re.findall(r"\d+", str(about["version"]))[:3]] < [*OLDEST_COMFYUI]:
            log.error("this ComfyUI is too old: update it to 0.3.45 or later, which lets a caller choose the prompt id")

    def _tell_job(self, message: Message, prompt_id: str | None = None) -> None:
        job = self._job
        if job and prompt_id in (None, job.prompt_id):
            job.inbox.put(message)

    # running a prompt

    def run(self, job: Job) -> dict[str, Any]:
        """Runs the job's workflow to its end, good or bad, and returns its history entry.

        Raises JobError: workflow_rejected, timeout, cancelled, comfyui_lost, comfyui_error, or the error of `job.stop`.
        """
        limit = self.settings.job_timeout
        late = JobError(504, "timeout", f"the job took more than the {limit:g} s of JOB_TIMEOUT; it was interrupted")
        alarm = threading.Timer(limit or threading.TIMEOUT_MAX, job.stop, [late])
        alarm.daemon = True
        self._job = job
        entry = None
        try:
            if limit:
                alarm.start()
            for _ in range(2):
                self._submit(job)
                if entry := self._wait(job):
                    return entry
                log.warning("job %s: ComfyUI has lost its prompt", job.request_id)
        finally:
            alarm.cancel()
            if not entry:
                self._stop_prompt(job)
            self._job = None
        raise JobError(502, "comfyui_lost", "ComfyUI died twice under this job: it may be the job that kills it")

    def _submit(self, job: Job) -> None:
        """Posts the prompt once there is a connection that will hear of it."""
        while not self._client_id:
            job.next_message(self._patience())  # "connected", perhaps
        body: dict[str, Any] = {"prompt": job.workflow, "prompt_id": job.prompt_id, "client_id": self._client_id}
        if job.comfy_org_api_key:
            body["extra_data"] = {"api_key_comfy_org": job.comfy_org_api_key}
        try:
            status, answer = self._exchange("/prompt", body)
        except CONNECTION_LOST:  # nobody knows whether it was taken
            job.inbox.put({"type": "connection_lost"})
            return
        if status == 400 and answer:
            raise self._rejection(answer, job.workflow)
        if status != 200 or not answer or answer.get("prompt_id") != job.prompt_id:
            raise JobError(502, "comfyui_error", f"ComfyUI answered POST /prompt with {status}; its log may say why")
        if answer.get("node_errors"):
            dropped = scrub("; ".join(self._complaints(answer["node_errors"], job.workflow)))
            job.warnings.append(f"ComfyUI dropped the outputs that depend on invalid nodes: {dropped}")

    def _wait(self, job: Job) -> dict[str, Any] | None:
        """The prompt's history entry once it has ended; None when ComfyUI lost the prompt with its connection."""
        lost = False
        while True:
            message = job.next_message(LOOK_UP_SECONDS if lost else SILENCE_SECONDS)
            lost = lost or message == {"type": "connection_lost"}
            if message and not lost and not _is_end(message):
                continue
            try:
                found = self._look_up(job.prompt_id)
            except CONNECTION_LOST:
                lost = found = bool(self._patience())
            if isinstance(found, dict):
                if not message and not lost and self._socket:
                    self._socket.abort()  # type: ignore[no-untyped-call]  # it kept silent about the end: another is opened
                return found
            if not found and not lost:
                raise JobError(499, "cancelled", "the job was deleted from ComfyUI's queue")
            if not found:
                return None

    def _look_up(self, prompt_id: str) -> dict[str, Any] | bool:
        """The prompt's history entry; else whether it is in the queue."""
        for _ in range(2):  # it may end between the two questions
            if entry := self._get(f"/history/{prompt_id}").get(prompt_id):
                return dict(entry)
            if self._is_queued(prompt_id):
                return True
        return False

    def _is_queued(self, prompt_id: str, *places: str) -> bool:
        listed = self._get("/queue")
        return any(item[1] == prompt_id for place in places or listed for item in listed[place])

    def _stop_prompt(self, job: Job) -> None:
        """Takes the prompt off ComfyUI: out of its queue, or off the GPU; waits a while for it to leave."""
        try:
            self._exchange("/queue", {"delete": [job.prompt_id]})
            # looked up first: versions before the targeted form interrupt whoever runs
            if not self._is_queued(job.prompt_id, "queue_running"):
                return
            self._exchange("/interrupt", {"prompt_id": job.prompt_id})
        except (*CONNECTION_LOST, JobError) as error:
            log.warning("job %s could not be stopped in ComfyUI: %s", job.request_id, error)
            return
        deadline = time.monotonic() + INTERRUPT_SECONDS
        with contextlib.suppress(queue.Empty):
            while not _is_end(job.inbox.get(timeout=max(0.0, deadline - time.monotonic()))):
                pass

    def _patience(self) -> float:
        """The seconds that ComfyUI may still stay away; comfyui_lost when there are none left."""
        limit = self.settings.comfyui_return_timeout
        left = limit - (time.monotonic() - self._failing_since if self._failing_since else 0)
        if left <= 0:
            raise JobError(502, "comfyui_lost", f"ComfyUI went away and did not come back within {limit:g} s")
        return left

    # files

    @contextlib.contextmanager
    def open(self, output: Output) -> Iterator[Download]:
        """Opens one file that ComfyUI's history names, and notes its mimetype and size (bytes) in `output`."""
        query = urllib.parse.urlencode({name: output[name] for name in ("filename", "subfolder", "type")})
        with self._open(f"/view?{query}") as response:
            if response.status == 404:
                raise JobError(502, "output_missing", f"{output['filename']} is no longer on ComfyUI's disk")
            if response.status != 200:
                raise JobError(502, "comfyui_error", f"ComfyUI answered {response.status} to {output['filename']}")
            output["mimetype"] = response.headers.get_content_type()
            output["size"] = int(response.headers["Content-Length"])
            yield Download(response, output["size"])

    # HTTP

    def _open(self, path: str, body: Any = None, seconds: float = HTTP_SECONDS) -> Any:
        """The answer, whatever its status; raises CONNECTION_LOST."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            return _direct.open(request, timeout=seconds)
        except urllib.error.HTTPError as error:
            return error

    def _exchange(self, path: str, body: Any = None, seconds: float = HTTP_SECONDS) -> tuple[int, dict[str, Any]]:
        """The status and the JSON body, {} where it is none."""
        with self._open(path, body, seconds) as response, contextlib.suppress(ValueError):
            return response.status, json.load(response)
        return response.status, {}

    def _get(self, path: str, seconds: float = HTTP_SECONDS) -> dict[str, Any]:
        status, answer = self._exchange(path, None, seconds)
        if status != 200:
            raise JobError(502, "comfyui_error", f"ComfyUI answered GET {path} with {status}; its log may say why")
        return answer

    # what ComfyUI says against a workflow, in words

    def _rejection(self, answer: dict[str, Any], graph: Graph) -> JobError:
        error, node_errors = answer.get("error") or {}, answer.get("node_errors") or {}
        complaints = self._complaints(node_errors, graph) or [f"{error.get('message')} {error.get('details')}"]
        unknown = re.fullmatch(r"Node ID '#(.*)'", str(error.get("details")))
        if error.get("type") == "prompt_no_outputs":
            complaints = ["it has no output node; add one that saves, such as SaveImage, and connect it"]
        elif unknown and unknown[1] in graph:
            class_type = graph[unknown[1]]["class_type"]
            complaints = [f"{class_type} (node {unknown[1]}): ComfyUI has no such node; install what brings it"]
        more = f"; and {len(complaints) - 5} more" if len(complaints) > 5 else ""
        message = scrub(f"ComfyUI refuses the workflow: {'; '.join(complaints[:5])}{more}")
        return JobError(422, "workflow_rejected", message, node_errors=scrub(node_errors))

    def _complaints(self, node_errors: dict[str, Any], graph: Graph) -> list[str]:
        return [
            f"{node['class_type']} (node {node_id}): {self._complaint(node['class_type'], error, graph)}"
            for node_id, node in node_errors.items()
            for error in node["errors"]
        ]

    def _complaint(self, class_type: str, error: dict[str, Any], graph: Graph) -> str:
        extra, details = error.get("extra_info") or {}, str(error.get("details", ""))
        name = extra.get("input_name", "")
        if error["type"] == "required_input_missing":
            return f"{name} is missing"
        if error["type"] == "value_not_in_list":
            return self._not_in_list(class_type, name, extra.get("received_value"))
        if error["type"].startswith("exception_during") and details.strip("'") not in graph and details[:1] == "'":
            return f"it is linked to node {details}, which is not in the workflow"
        return f"{name}: {error['message']}" if name and details in ("", name) else f"{error['message']}: {details}"

    def _not_in_list(self, class_type: str, name: str, value: Any) -> str:
        """Asks for the choices: ComfyUI leaves out those of a list of more than 20."""
        about = self._get(f"/object_info/{urllib.parse.quote(class_type, safe='')}").get(class_type, {})
        declared = {key: each for inputs in about.get("input", {}).values() for key, each in inputs.items()}
        # [[choice, …], {…}] or, as newer nodes have it, ["COMBO", {"options": [choice, …]}]
        kind, *options = declared.get(name, [[]])
        choices = kind if isinstance(kind, list) else (options or [{}])[0].get("options", [])
        listed = ", ".join(map(str, choices[:50])) + (f" and {len(choices) - 50} more" if len(choices) > 50 else "")
        is_file = isinstance(value, str) and re.search(r"\.\w{2,12}$", value)
        return f"{name} {value!r} is {'not installed' if is_file else 'not a choice'}; there is: {listed or 'none'}"


class Download:
    """A file on its way from ComfyUI, `size` in bytes; cut short, it raises ConnectionError where http.client ends."""

    def __init__(self, response: http.client.HTTPResponse, size: int) -> None:
        self._response = response
        self._left = self.size = size

    def read(self, size: int | None = -1) -> bytes:
        """At most so many bytes, or all that is left."""
        wanted = self._left if size is None or size < 0 else min(size, self._left)
        chunk = self._response.read(wanted)
        self._left -= len(chunk)
        if len(chunk) < wanted:
            raise ConnectionError(f"ComfyUI's answer ended {self._left} bytes early")
        return chunk


def _is_end(message: Message) -> bool:
    """Whether it is what ComfyUI sends once a prompt has ended and its history is written."""
    return message["type"] == "executing" and message["data"].get("node", "") is None


def failure(entry: dict[str, Any]) -> JobError | None:
    """What went wrong, as a history entry has it; None for a job that succeeded."""
    status = entry.get("status") or {}
    messages = dict(status.get("messages") or [])
    if status.get("completed"):
        return None
    if "execution_interrupted" in messages:
        return JobError(499, "cancelled", "the job was interrupted in ComfyUI")
    if "execution_error" not in messages:
        return JobError(502, "comfyui_error", "ComfyUI ended the job without saying why; its log may")
    names = ("node_id", "node_type", "exception_type", "exception_message")
    about = scrub({name: str(messages["execution_error"].get(name, "")).strip() for name in names})
    message = f"{about['node_type']} (node {about['node_id']}) failed: {about['exception_message']}"
    if "OutOfMemory" in about["exception_type"] or "out of memory" in message.lower():
        return JobError(500, "out_of_memory", f"{message}; use a smaller picture, batch or model", **about)
    return JobError(500, "execution_failed", message, **about)


def read_outputs(entry: dict[str, Any], graph: Graph) -> list[Output]:
    """Every file and text of a history entry: nodes in the graph's order, then those that ComfyUI made up itself."""
    outputs = entry.get("outputs") or {}
    order = [node_id for node_id in graph if node_id in outputs] + sorted(outputs.keys() - graph.keys())
    listed = [(id, kind, items) for id in order for kind, items in outputs[id].items() if isinstance(items, list)]
    return [output for each in listed for output in _read_items(*each)]


def _read_items(node_id: str, kind: str, items: list[Any]) -> list[Output]:
    where = {"node_id": node_id, "output_type": kind}
    if kind == "text":
        return [{**where, "value": items}]
    defaults = {"filename": "", "subfolder": "", "type": "output"}
    files = [item for item in items if isinstance(item, dict) and item.get("filename")]  # the rest are flags
    return [{**{name: item.get(name, defaults[name]) for name in defaults}, **where} for item in files]


_SECRET_KEYS = {"traceback", "api_key_comfy_org", "auth_token_comfy_org"}
_QUOTED_PATH = re.compile(r"""(['"])(?:/|[A-Za-z]:\\)[^'"]*[/\\]([^'"/\\]+)\1""")  # may have spaces in it
_PATH = re.compile(r"""(?<![\w./:<-])(?:/|[A-Za-z]:\\)(?:[^/\\\s'"]+[/\\])+([^/\\\s'"]*)""")


def scrub(value: Any) -> Any:
    """ComfyUI's words, fit for an answer: without tracebacks and keys, absolute paths cut to the file's name."""
    if isinstance(value, dict):
        return {name: scrub(each) for name, each in value.items() if name not in _SECRET_KEYS}
    if isinstance(value, list):
        return [scrub(each) for each in value]
    if isinstance(value, str):
        return _PATH.sub(r"\1", _QUOTED_PATH.sub(r"\1\2\1", value))
    return None if value in (float("inf"), float("-inf")) or value != value else value  # JSON has no such numbers


# Delivery #############################################################################################################

WEBHOOK_PAUSES_SECONDS = (4, 20, 100, 480)  # between five tries, each 20 % more or less


class Delivery:
    """Brings a job's outputs to where it wants them."""

    def __init__(self, settings: Settings, comfyui: ComfyUI) -> None:
        self._settings = settings
        self._comfyui = comfyui

    def deliver(self, job: Job, outputs: list[Output]) -> JobError | None:
        """Puts into `job.outputs` every text, and every file that is no preview, with mimetype, size, and url or data.

        Returns the first failure (upload_failed, output_missing, comfyui_error), once all the rest is delivered.
        """
        job.outputs = [output for output in outputs if output.get("type") != "temp"]
        if not job.outputs and not failure(job.entry):
            made = "only previews (type temp), which are not delivered" if outputs else "no outputs"
            job.warnings.append(f"the job made {made}; use a node that saves, such as SaveImage")
        files = [output for output in job.outputs if "filename" in output]
        return next(filter(None, [self._deliver_file(job, file) for file in files]), None)

    def _deliver_file(self, job: Job, output: Output) -> JobError | None:
        try:
            if job.s3:
                self._upload(job, job.s3, output)
            if job.as_base64 or "url" not in output:
                self._embed(output, job.as_base64 or job.s3 is not None)
        except JobError as error:
            return error
        self._find(output)
        if reason := output.get("upload_error"):
            return JobError(502, "upload_failed", f"S3 did not take {output['filename']}: {reason}")
        return None

    def _upload(self, job: Job, target: S3Target, output: Output) -> None:
        from boto3.s3.transfer import TransferConfig
        from botocore.exceptions import BotoCoreError, ClientError

        client = s3_client(target, self._settings)
        folders = output["subfolder"].replace("\\", "/").split("/")
        key = "/".join(part for part in (str(job.request_id), *folders, output["filename"]) if part)
        where = {"Bucket": target.bucket_name, "Key": self._settings.s3_prefix + key}
        # without threads a stream is uploaded in 8 MB of memory instead of 120
        config = TransferConfig(use_threads=False)
        try:
            with self._comfyui.open(output) as file:
                client.upload_fileobj(file, *where.values(), {"ContentType": output["mimetype"]}, Config=config)
            expires = self._settings.s3_url_expires
            output["url"] = client.generate_presigned_url("get_object", Params=where, ExpiresIn=expires)
        except (BotoCoreError, ClientError, KeyError) as error:  # KeyError: of an answer that is no S3's
            output["upload_error"] = _without_keys(str(error), target)

    def _embed(self, output: Output, wanted: bool) -> None:
        """Puts the file's bytes into the output if they are wanted; mimetype and size always are."""
        limit = self._settings.output_base64_max_bytes
        with self._comfyui.open(output) as file:
            if not wanted:
                return
            if file.size > limit:
                output["error"] = f"{file.size} bytes are more than the {limit} of OUTPUT_BASE64_MAX_BYTES; use S3"
            else:
                output["data"] = base64.b64encode(file.read()).decode()

    def _find(self, output: Output) -> None:
        folder = pathlib.Path(self._settings.comfyui_install_path).absolute() / output["type"]
        path = folder / output["subfolder"] / output["filename"]
        with contextlib.suppress(OSError):  # of a folder that the worker may not enter
            if self._settings.comfyui_install_path and path.is_file():
                output["local_path"] = str(path)


@functools.lru_cache(maxsize=32)  # making a client takes 100 ms; threads can share it
def s3_client(target: S3Target, settings: Settings) -> Any:
    """A boto3 client for the target; 400 where none can be made."""
    try:
        import boto3  # here, because not every worker needs S3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise invalid("this worker cannot use S3: its operator has to pip install boto3") from None
    config = Config(
        signature_version="s3v4",
        # with "auto", AWS' presigned URLs lead to us-east-1, whatever the region
        s3={"addressing_style": "path" if target.endpoint_url else "virtual"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        connect_timeout=settings.s3_connect_timeout,
        retries={"mode": "standard", "total_max_attempts": settings.s3_connect_attempts},
    )
    region = target.region or ("us-east-1" if target.endpoint_url else None)
    try:
        session = boto3.Session(target.access_key_id or None, target.secret_access_key or None)
        client = session.client("s3", region, endpoint_url=target.endpoint_url or None, config=config)
        has_keys = session.get_credentials()
    except (ValueError, BotoCoreError) as error:
        raise invalid(f"the S3 settings cannot be used: {_without_keys(str(error), target)}") from None
    if not has_keys:
        raise invalid("S3 has no keys: give s3.access_key_id and s3.secret_access_key, or set them in the environment")
    return client


def _without_keys(text: str, target: S3Target) -> str:
    for key in filter(None, (target.secret_access_key, target.access_key_id)):
        text = text.replace(key, "***")
    return text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A signed message goes where it was meant to go, or nowhere."""


_webhooks = urllib.request.build_opener(_NoRedirect)


def post_webhook(webhook: Webhook, message_id: str, body: bytes) -> str:
    """One try, signed after the Standard Webhooks specification; 'delivered', 'refused', or 'failed': worth a retry."""
    timestamp = str(int(time.time()))
    headers = {"webhook-id": message_id, "webhook-timestamp": timestamp, "Content-Type": "application/json"}
    headers["User-Agent"] = f"ComfyUI-PyWorker/{__version__}"
    if webhook.key:
        digest = hmac.digest(webhook.key, f"{message_id}.{timestamp}.".encode() + body, "sha256")
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    try:
        _webhooks.open(urllib.request.Request(webhook.url, body, headers), timeout=webhook.timeout).close()
        return "delivered"
    except urllib.error.HTTPError as error:
        error.close()
        return "failed" if error.code in (408, 429) or error.code >= 500 else "refused"
    except (*CONNECTION_LOST, UnicodeError):  # of a name that cannot be looked up
        return "failed"


def deliver_webhook(webhook: Webhook, message_id: str, body: bytes) -> None:
    """Posts the message until its receiver takes or refuses it, five times at most: takes 13 minutes at the longest."""
    pause = threading.Event()
    for seconds in (*WEBHOOK_PAUSES_SECONDS, None):
        outcome = post_webhook(webhook, message_id, body)
        if outcome != "failed" or seconds is None:
            break
        log.warning("webhook %s failed; it is tried again in about %g s", message_id, seconds)
        pause.wait(seconds * random.uniform(0.8, 1.2))
    if outcome != "delivered":
        log.error("webhook %s was not delivered: %s", message_id, outcome)


# Worker ###############################################################################################################


class Line:
    """The lock around the GPU: one job runs, the others wait, first ready first served."""

    def __init__(self, max_waiting: int) -> None:
        self._lock = threading.Lock()
        self._max_waiting = max_waiting
        self._closed = False
        self.waiting: list[Job] = []
        self.running: Job | None = None

    @contextlib.contextmanager
    def turn(self, job: Job) -> Iterator[None]:
        """The job's time on the GPU, entered when its turn comes; 503 without a place, or what `job.stop` was given."""
        with self._lock:
            if self._closed:
                raise not_ready("stopping")
            if self.running and len(self.waiting) >= self._max_waiting and not job.was_accepted:
                raise JobError(503, "queue_full", f"{self._max_waiting} jobs are waiting already; try again later")
            job.was_accepted = True
            self.waiting.append(job)
            self._advance()
        try:
            with job.timed("queue_ms"):
                job.next_message()  # "turn"
            yield
        finally:
            with self._lock:
                if self.running is job:
                    self.running = None
                else:
                    self.waiting.remove(job)
                self._advance()

    def _advance(self) -> None:
        if self.waiting and not self.running:
            self.running = self.waiting.pop(0)
            self.running.inbox.put({"type": "turn"})

    def close(self) -> None:
        """Gives every waiting job back and takes no more; the running one goes on."""
        with self._lock:
            self._closed = True
            for job in self.waiting:
                job.stop(not_ready("stopping"))


def not_ready(state: str) -> JobError:
    """What a worker answers to a job that it cannot begin."""
    if state == "stopping":
        return JobError(503, "shutting_down", "the worker is stopping; send the job again, to another one or later")
    trouble = "is not up yet" if state == "starting" else "does not answer"
    return JobError(503, "comfyui_unavailable", f"ComfyUI {trouble}; try again later")


class Clients:
    """Stops the job of a client that goes away, or only shuts down its sending side: they look the same."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        # only Linux tells of a hang-up while bytes are unread; elsewhere a job runs to its end
        self._poll = select.epoll() if hasattr(select, "epoll") else None
        if self._poll:
            threading.Thread(target=self._listen, args=[self._poll], name="hang-ups", daemon=True).start()

    @contextlib.contextmanager
    def watch(self, job: Job) -> Iterator[None]:
        """Stops the job in the block when its client goes, unless a webhook is to hear of it."""
        if not self._poll or not job.connection or job.webhook:
            yield
            return
        number = job.connection.fileno()
        self._jobs[number] = job
        self._poll.register(number, select.EPOLLRDHUP | select.EPOLLONESHOT)
        try:
            yield
        finally:
            self._poll.unregister(number)
            del self._jobs[number]

    def _listen(self, poll: Any) -> None:
        while True:
            for number, _ in poll.poll():
                job = self._jobs.get(number)
                if job and _is_gone(number):  # the number may be another connection's by now
                    job.stop(JobError(499, "cancelled", "the client closed its connection"))


def _is_gone(number: int) -> bool:
    poll = select.poll()
    poll.register(number, select.POLLRDHUP)
    return bool(poll.poll(0))


class Tally:
    """Counts what is under way, so that a stopping worker can wait for its end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.count = 0

    def __enter__(self) -> None:
        with self._changed:
            self.count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self.count -= 1
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Whether everything ended in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.count, seconds)


class Worker:
    """Takes requests to their answers: the one place that knows the order of things."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.under_way = Tally()  # requests that are not answered yet, webhooks that are owed
        self.comfyui = ComfyUI(settings)
        self._delivery = Delivery(settings, self.comfyui)
        self._line = Line(settings.max_queue_size)
        self._clients = Clients()
        self._modifiers = load_modifiers()
        self._stopping = False
        self._started_at = time.monotonic()

    def answer(self, job: Job, body: bytes) -> tuple[int, dict[str, Any]]:
        """Takes the job that `body` asks for to its end; returns the HTTP status and the envelope, for failures too."""
        error = None
        try:
            read_job(job, parse_input(body), self.settings)
            self._process(job)
        except JobError as failed:
            error = failed
        except CONNECTION_LOST as lost:  # to ComfyUI; while it runs the job, ComfyUI.run sees to it
            gone = JobError(502, "comfyui_lost", f"ComfyUI went away: {lost}")
            error = gone if job.was_accepted else not_ready("unreachable")
        except Exception:  # a bug of ours must not cost the client its answer, nor the webhook its message
            log.exception("job %s met a bug of the worker", job.request_id)
            error = JobError(500, "internal_error", "the worker failed; its log says why")
        answer = envelope(job, error)
        outcome = f"{error.type} ({error.status}): {error.message}" if error else "completed"
        timings = ", ".join(f"{name} {answer['timings'][name]}" for name in (*TIMINGS, "total_ms"))
        log.info("job %s %s; %s", job.request_id, outcome.encode("unicode_escape").decode(), timings)
        if job.was_accepted and job.webhook:
            self._notify(job, job.webhook, answer)
        return error.status if error else 200, answer

    def _process(self, job: Job) -> None:
        """Prepares the job, runs it on the GPU when its turn comes, and delivers what it made."""
        with job.timed("preprocess_ms"):
            if self.state() != "ready":
                self.comfyui.describe()  # what is known may be old, where nobody probes
                if (state := self.state()) != "ready":
                    raise not_ready(state)
            self._build(job)
            if job.s3:
                s3_client(job.s3, self.settings)  # 400 before GPU time is spent, where S3 cannot be used
        error = self._run(job)
        for _ in range(2):  # a busy ComfyUI may take the prompt first and clear its cache after it
            if error and error.type == "output_missing":  # of a cached job: somebody has deleted its files since
                self.comfyui.clear_cache()
                job.prompt_id = str(uuid.uuid4())
                error = self._run(job)
        if error:
            raise error

    def _run(self, job: Job) -> JobError | None:
        with self._clients.watch(job), self._line.turn(job), job.timed("generation_ms"):
            job.entry = _without_key(self.comfyui.run(job), job.comfy_org_api_key)
        with job.timed("postprocess_ms"):
            undelivered = self._delivery.deliver(job, read_outputs(job.entry, job.workflow))
        return failure(job.entry) or undelivered

    def _build(self, job: Job) -> None:
        """Has the job's modifier, if it names one, build its workflow."""
        if not job.modifier:
            return
        if not self._modifiers:
            raise invalid(
                "this worker has no modifiers: modifiers.py is not beside pyworker.py", "invalid_modification"
            )
        try:
            job.workflow = read_graph(self._modifiers.build(job.modifier, job.modifications, self.comfyui))
        except self._modifiers.InvalidModification as error:
            raise invalid(str(error), "invalid_modification", **error.details) from None

    def _notify(self, job: Job, webhook: Webhook, answer: dict[str, Any]) -> None:
        """Starts a thread for the webhook: a receiver that never answers delays nobody."""
        body = json.dumps({**answer, "extra": webhook.extra_params}).encode()
        owed = contextlib.ExitStack()
        owed.enter_context(self.under_way)

        def deliver() -> None:
            with owed:
                deliver_webhook(webhook, job.prompt_id, body)

        threading.Thread(target=deliver, name="webhook", daemon=True).start()

    def state(self) -> str:
        """'ready', or why not: 'starting', 'unreachable', 'stopping'."""
        return "stopping" if self._stopping else self.comfyui.state()

    def health(self) -> tuple[int, dict[str, Any]]:
        """The HTTP status and the body of GET /health."""
        comfyui = self.comfyui.describe()
        state = self.state()
        running = self._line.running
        return 200 if state == "ready" else 503, {
            "status": state,
            "running": running.request_id if running else None,
            "queued": len(self._line.waiting),
            "cost": COST,
            "modifiers": sorted(self._modifiers.MODIFIERS) if self._modifiers else [],
            "comfyui": comfyui,
            "version": __version__,
            "uptime_s": round(time.monotonic() - self._started_at),
        }

    def stop(self) -> None:
        """Takes no more jobs; returns once what is under way has ended, or was cancelled after SHUTDOWN_GRACE."""
        self._stopping = True
        self._line.close()
        grace = self.settings.shutdown_grace
        log.info("stopping: %d requests and webhooks under way get %g s", self.under_way.count, grace)
        if not self.under_way.wait(grace) and (running := self._line.running):
            running.stop(JobError(499, "cancelled", "the worker had to stop before the job ended"))
            self.under_way.wait(2 * INTERRUPT_SECONDS)
        log.info("stopped with %d requests and webhooks under way", self.under_way.count)


def _without_key(entry: dict[str, Any], key: str) -> dict[str, Any]:
    """The history entry without the key that partner nodes were given, which they may name as they like."""
    words = json.dumps(key)[1:-1]
    return dict(json.loads(json.dumps(entry).replace(words, "***"))) if words else entry


def load_modifiers() -> Any:
    """The module modifiers.py beside this file; None where there is none."""
    return importlib.import_module("modifiers") if pathlib.Path(__file__).with_name("modifiers.py").exists() else None


def envelope(job: Job, error: JobError | None) -> dict[str, Any]:
    """The answer to a request, in the contract's shape."""
    now = time.time()
    answer = {
        "id": job.request_id,
        "status": error.outcome if error else "completed",
        "message": error.message if error else f"outputs delivered: {len(job.outputs)}",
        "output": job.outputs,
        "seeds": seeds(job.workflow),
        "timings": {
            "queued_at_ms": round(job.received_at * 1000),
            **{name: round(value) for name, value in job.timings.items()},
            "completed_at_ms": round(now * 1000),
            "total_ms": round((now - job.received_at) * 1000),
        },
        "comfyui_response": scrub(job.entry) if job.include_comfyui_response else {},
        "warnings": job.warnings,
    }
    return {**answer, "error": {"type": error.type, "message": error.message, **error.details}} if error else answer


# HTTP #################################################################################################################

CONNECTION_SECONDS = 30  # without a byte on a connection that owes us some
DRAIN_SECONDS = 5  # for a client to see its refusal while it is still sending
ROUTES = {"/generate/sync": ["POST"], "/health": ["GET", "HEAD"]}
STATUS_HEADERS = {401: ("WWW-Authenticate", "Bearer"), 503: ("Retry-After", "5")}


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. Translates between HTTP and the worker, and decides nothing."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = CONNECTION_SECONDS
    disable_nagle_algorithm = True  # a keep-alive client waits 40 ms for each answer otherwise
    wbufsize = 1 << 16  # headers and a small body in one write
    owes_body = False

    def __getattr__(self, name: str) -> Callable[[], None]:
        # http.server looks for do_METHOD; all of them come here, so that an unknown one is answered like any other
        if name.startswith("do_"):
            return self._handle
        raise AttributeError(name)

    def _handle(self) -> None:
        # a head that http.server half understands hides where the next request begins
        malformed = bool(self.headers.defects) or any(name != name.strip() for name in self.headers)
        lengths = self.headers.get_all("Content-Length", ["0"])
        self.owes_body = malformed or lengths != ["0"] or "Transfer-Encoding" in self.headers
        with self.server.worker.under_way:
            try:
                if malformed:
                    raise invalid("a header of the request is malformed")
                status, answer = self._route()
            except JobError as error:
                status, answer = error.status, envelope(Job(), error)
            self._send(status, answer)

    def _route(self) -> tuple[int, dict[str, Any]]:
        worker = self.server.worker
        path = re.sub("^https?://[^/]*", "", self.path).partition("?")[0]
        origin = self.headers.get("Origin")
        # keeps a page in somebody's browser from using a worker that only this browser's machine can reach
        if origin and origin.partition("://")[2] != self.headers.get("Host"):
            raise JobError(403, "forbidden_origin", "requests of a page from another origin are refused")
        if path not in ROUTES:
            raise JobError(404, "not_found", "there is nothing here; there is POST /generate/sync and GET /health")
        if self.command not in ROUTES[path]:
            raise JobError(405, "method_not_allowed", f"{path} takes {' or '.join(ROUTES[path])}", allow=ROUTES[path])
        if path == "/health":
            return worker.health()
        wanted, given = f"Bearer {worker.settings.auth_token}", self.headers.get("Authorization", "")
        if worker.settings.auth_token and not hmac.compare_digest(wanted.encode(), given.encode("latin-1")):
            raise JobError(401, "unauthorized", "this worker needs the header 'Authorization: Bearer …' with its token")
        wants_response = self.headers.get("X-Include-ComfyUI-Response") in ("1", "true")
        included = wants_response or worker.settings.include_comfyui_response
        return worker.answer(Job(connection=self.connection, include_comfyui_response=included), self._read_body())

    def _read_body(self) -> bytes:
        lengths = set(self.headers.get_all("Content-Length", []))
        limit = self.server.worker.settings.max_body_bytes
        if not lengths or "Transfer-Encoding" in self.headers:
            raise JobError(411, "length_required", "send the body with a Content-Length, not in chunks")
        if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", text := lengths.pop()):
            raise invalid("Content-Length has to be one number")
        length = int(text)
        if length > limit:
            raise JobError(413, "body_too_large", f"the body has {length} bytes; MAX_BODY_BYTES allows {limit}")
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
        """Has the body come only once it is wanted, in _read_body: a refusal is to be seen before it."""
        return True

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status in STATUS_HEADERS:
            self.send_header(*STATUS_HEADERS[status])
        if status == 405:
            self.send_header("Allow", ", ".join(answer["error"]["allow"]))
        if self.owes_body or self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)
        self.wfile.flush()
        if self.owes_body:
            self._drain()

    def _drain(self) -> None:
        """Reads on for a while after a refusal: closing on unread bytes would reset the connection under the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + DRAIN_SECONDS
        self.connection.settimeout(DRAIN_SECONDS)
        while self.rfile.read1(1 << 16) and time.monotonic() < deadline:
            pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses (a malformed or oversized head), in the shape of every other answer."""
        self.close_connection = True
        self.request_version = self.protocol_version  # http.server answers a line that it cannot read without a head
        self._send(code, envelope(Job(), JobError(code, "invalid_request", f"the request cannot be read: {message}")))

    def version_string(self) -> str:
        """The Server header."""
        return f"ComfyUI-PyWorker/{__version__}"

    def log_message(self, format: str, *args: Any) -> None:
        """The log has a line per job; requests are a proxy's to log."""


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens, with a thread per connection."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024  # connections that arrive together; the kernel's own limit may be lower

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        host = worker.settings.worker_host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, worker.settings.port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news; anything else is a bug."""
        if not isinstance(sys.exc_info()[1], CONNECTION_LOST):
            log.exception("a connection met a bug of the worker")


# Command line #########################################################################################################


def main() -> None:
    """Runs the worker until it is told to stop by SIGTERM or SIGINT; a second signal stops it at once."""
    given = {name: value for name, value in vars(_parser().parse_args()).items() if value is not None}
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)  # and the libraries at their warnings
    try:
        settings = Settings.read({**os.environ, **given})
        server = Server(Worker(settings))
    except ValueError as error:
        sys.exit(f"pyworker: {error}")
    except OSError as error:
        sys.exit(f"pyworker: cannot listen on {settings.worker_host} port {settings.port}: {error}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, functools.partial(_stop, server))
    log.info("ComfyUI PyWorker %s listens on http://%s:%s", __version__, *server.server_address[:2])
    _warn(settings)
    log.info("waiting for ComfyUI at %s; to start one: python main.py in its folder", settings.comfyui_api_base)
    threading.Thread(target=server.worker.comfyui.listen, name="websocket", daemon=True).start()
    server.serve_forever()


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {each.name.upper():26}{each.metadata['help']}" for each in fields(Settings))
    parser = argparse.ArgumentParser(
        description="Turns a ComfyUI into an HTTP API: POST /generate/sync runs a workflow.",
        epilog=f"environment:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", dest="WORKER_HOST", help="address to listen on, over WORKER_HOST")
    parser.add_argument("--port", dest="PORT", help="port to listen on, over PORT")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _warn(settings: Settings) -> None:
    """Says what an operator would regret later."""
    if settings.worker_host not in ("127.0.0.1", "::1", "localhost") and not settings.auth_token:
        log.warning("AUTH_TOKEN is not set: whoever reaches %s can use the GPU", settings.worker_host)
    if settings.s3_access_key_id and not settings.s3_bucket_name:
        log.warning("S3 keys are set but no S3_BUCKET_NAME: S3 is off for requests that name no bucket")


def _stop(server: Server, number: int, frame: Any) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: os._exit(1))

    def stop() -> None:
        server.worker.stop()
        server.shutdown()

    threading.Thread(target=stop, name="stop", daemon=True).start()


if __name__ == "__main__":
    main()
