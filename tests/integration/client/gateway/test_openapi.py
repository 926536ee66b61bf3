"""The published OpenAPI document, held by schemathesis: what it says is what the gateway does."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


async def test_schemathesis_finds_nothing(run_gateway: Any, tmp_path: Path) -> None:
    async with run_gateway(maximum_new_tokens=8, default_new_tokens=4) as running:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "run"),
            running.url + "/openapi.json",
            *("--checks", ",".join(CHECKS), "--seed", "1", "--max-examples", "15"),
            *("--header", f"Authorization: Bearer {running.key}"),
            *("--phases", "examples,coverage,fuzzing", "--request-timeout", "20", "--no-shrink"),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()[-6000:]
        metrics = await running.metrics()
        asked = {
            name.partition('status="')[2][:3]: count
            for name, count in metrics.items()
            if name.startswith('swarm_gateway_requests_total{route="/v1/chat/completions"')
        }
        assert asked["200"] > 5
        assert asked["400"] > 20
