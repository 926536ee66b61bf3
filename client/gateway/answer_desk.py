"""From a checked request to its answer over HTTP: whole, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

from aiohttp import web

from swarm.client.adapter_push import AdapterSource
from swarm.client.config import SamplingSettings
from swarm.client.gateway.admission import Admission, Caller
from swarm.client.gateway.answers import Event, Question, answering
from swarm.client.gateway.bodies import ChatBody, TextBody
from swarm.client.gateway.errors import ApiError
from swarm.client.gateway.limits import Usage
from swarm.client.gateway.metrics import GatewayMetrics
from swarm.client.gateway.payers import Payers
from swarm.client.gateway.replies import DONE, KEEP_ALIVE, Reply, event_of
from swarm.client.gateway.settings import GatewaySettings
from swarm.client.gateway.shelf import ServedModel, SwarmView
from swarm.client.gateway.token_text import TokenTexts
from swarm.client.remote_blocks import ChainOpener
from swarm.protocol.errors import ConfigError

CLIENT_LEFT = 499
CALLER = web.RequestKey("caller", Caller)
REQUEST_ID = web.RequestKey("request_id", str)
STARTED_S = web.RequestKey("started_s", float)
STATUS = web.RequestKey("status", int)

ENDING_S = 5.0
"""For answers that were told to end."""

AddHeaders = Callable[[web.Request, web.StreamResponse], None]


class AnswerDesk:
    """Has requests answered, within their limits of time."""

    def __init__(
        self,
        settings: GatewaySettings,
        client: SwarmView,
        admission: Admission,
        metrics: GatewayMetrics,
        add_headers: AddHeaders,
    ) -> None:
        self._settings = settings
        self._client = client
        self._payers = Payers(client)
        self._admission = admission
        self._metrics = metrics
        self._add_headers = add_headers
        self._running: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.stopping = False

    async def finish(self, grace_s: float) -> None:
        """Refuse new answers, and wait for the running ones; after ``grace_s`` they are ended."""
        self.stopping = True
        if await self._idle_within(grace_s):
            return
        for deadline in self._running:
            deadline.reschedule(asyncio.get_running_loop().time())
        await self._idle_within(ENDING_S)

    async def _idle_within(self, limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def answer(
        self,
        request: web.Request,
        model: ServedModel,
        body: ChatBody | TextBody,
        adapter: AdapterSource | None,
        prompt_ids: list[int],
        settings: SamplingSettings,
    ) -> web.StreamResponse:
        """Raises ApiError for what fails before the first byte is sent."""
        self._check_room(model, prompt_ids)
        patience_s = self._settings.resume_patience_s
        options = body.stream_options
        question = Question(
            model.local,
            prompt_ids,
            settings,
            body.choices,
            adapter,
            patience_s,
            tells_plan=bool(options and options.include_chain),
        )
        if self.stopping:
            raise ApiError(503, "this gateway is stopping", code="stopping", retry_after_s=1)
        reply = _reply(request[REQUEST_ID], model, body, question)
        stream = _EventStream(request, self._settings, self._admission, self._add_headers)
        usage: Usage | None = None
        deadline = asyncio.timeout(self._settings.request_timeout_s)
        try:
            async with deadline, AsyncExitStack() as stack:
                self._running.add(deadline)
                self._idle.clear()
                usage = await stack.enter_async_context(
                    self._admission.admitted(
                        request[CALLER],
                        prompt_tokens=len(prompt_ids),
                        answers=question.choices,
                    )
                )
                client = self._client_for(request[CALLER])
                queue = await stack.enter_async_context(answering(client, question))
                events = self._events(request, queue, question.choices)
                if body.stream:
                    return await _send(stream, reply, events)
                return await self._whole(request, reply, events)
        except TimeoutError:
            failure = (
                ApiError(503, "this gateway is stopping", code="stopping", retry_after_s=1)
                if self.stopping
                else ApiError(504, "the answer took too long", code="timeout")
            )
            if not stream.has_begun:
                raise failure from None
            return await stream.fail(failure)
        finally:
            self._running.discard(deadline)
            if not self._running:
                self._idle.set()
            if usage is not None:
                usage.tokens.take(time.monotonic(), reply.completion_tokens)
                self._metrics.tokens(model.name, len(prompt_ids), reply.completion_tokens)

    def _client_for(self, caller: Caller) -> ChainOpener:
        """The client, under the policy of the key and paid by its account. Raises ApiError."""
        grants = self._payers.grants_of(caller.payer)
        if caller.policy is None and grants is None:
            return self._client
        try:
            return self._client.under(caller.policy, grants)
        except ConfigError as error:
            raise ApiError(403, str(error), code="policy_conflict") from None

    def _check_room(self, model: ServedModel, prompt_ids: list[int]) -> None:
        room = model.local.maximum_tokens - len(prompt_ids)
        if not prompt_ids:
            raise ApiError(400, "the prompt is empty", code="invalid_value", param="prompt")
        if room < 1:
            raise ApiError(
                400,
                f"this model's context is {model.local.maximum_tokens} tokens; "
                f"the prompt has {len(prompt_ids)}",
                code="context_length_exceeded",
                param="messages",
            )

    async def _events(
        self, request: web.Request, queue: asyncio.Queue[Event], choices: int
    ) -> AsyncIterator[Event | None]:
        """Until each choice has ended; None when nothing happened for a while."""
        running = choices
        is_first = True
        while running:
            try:
                event = queue.get_nowait()
            except asyncio.QueueEmpty:
                try:
                    async with asyncio.timeout(self._settings.keep_alive_s):
                        event = await queue.get()
                except TimeoutError:
                    yield None
                    continue
            if is_first and event.failure is None:
                self._metrics.first_token(time.monotonic() - request[STARTED_S])
                is_first = False
            running -= event.is_last
            yield event

    async def _whole(
        self, request: web.Request, reply: Reply, events: AsyncIterator[Event | None]
    ) -> web.StreamResponse:
        async for event in events:
            if event is None:
                continue
            if event.failure is not None:
                raise event.failure
            reply.add(event)
        return web.json_response(reply.whole(), headers=self._admission.headers(request[CALLER]))


class _EventStream:
    """A response that begins with its first event, so that errors before it have their status."""

    def __init__(
        self,
        request: web.Request,
        settings: GatewaySettings,
        admission: Admission,
        add_headers: AddHeaders,
    ) -> None:
        self._request = request
        self._write_timeout_s = settings.write_timeout_s
        self._admission = admission
        self._add_headers = add_headers
        self._response = web.StreamResponse()

    @property
    def has_begun(self) -> bool:
        return self._response.prepared

    async def send(self, content: bytes, opening: Callable[[], bytes]) -> None:
        """``opening`` gives what goes before the first content. Raises ConnectionResetError when
        the client does not read."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                if not self.has_begun:
                    self._response.headers.update(
                        {
                            "Content-Type": "text/event-stream; charset=utf-8",
                            "Cache-Control": "no-store",
                            "X-Accel-Buffering": "no",
                            **self._admission.headers(self._request[CALLER]),
                        }
                    )
                    self._add_headers(self._request, self._response)
                    await self._response.prepare(self._request)
                    content = opening() + content
                await self._response.write(content)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client does not read") from None

    async def finish(self, content: bytes) -> web.StreamResponse:
        """The last words."""
        async with asyncio.timeout(self._write_timeout_s):
            await self._response.write(content)
            await self._response.write_eof()
        # Clients may leave as soon as they have all: that counts as answered.
        self._request[STATUS] = self._response.status
        return self._response

    async def fail(self, failure: ApiError) -> web.StreamResponse:
        """Tell in mid-answer why there is no more."""
        return await self.finish(event_of(failure.to_json()) + DONE)


async def _send(
    stream: _EventStream, reply: Reply, events: AsyncIterator[Event | None]
) -> web.StreamResponse:
    async for event in events:
        if event is None:
            await stream.send(KEEP_ALIVE, reply.opening)
        elif event.failure is None:
            if content := reply.chunk(event):
                await stream.send(content, reply.opening)
        elif stream.has_begun:
            return await stream.fail(event.failure)
        else:
            raise event.failure
    return await stream.finish(reply.closing())


def _reply(
    request_id: str, model: ServedModel, body: ChatBody | TextBody, question: Question
) -> Reply:
    options = body.stream_options
    return Reply(
        request_id=request_id,
        model_name=body.model,
        fingerprint=f"fp_{model.revision.hex()[:12]}",
        created_unix_s=int(time.time()),
        is_chat=isinstance(body, ChatBody),
        choices=question.choices,
        prompt_tokens=len(question.prompt_ids),
        texts=TokenTexts(model.local.tokenizer, model.local.end_token_ids),
        wants_logprobs=question.settings.top_logprobs is not None,
        wants_usage=bool(options and options.include_usage),
        wants_chain=question.tells_plan,
    )
