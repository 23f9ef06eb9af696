"""Serving the page: on this machine only, unless told otherwise, and without a request to any other."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from dualout.errors import InputError

if TYPE_CHECKING:
    from dualout.app.studio import Studio

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""What a browser may load: nothing that is not served here."""


class Policy:
    """Adds the policy to every answer (ASGI middleware)."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, answer if scope["type"] == "http" else send)


def serve(studio: Studio, host: str = "127.0.0.1", port: int | None = None) -> tuple[Any, str]:
    """Start serving a studio's page; returns gradio's page, whose `close` ends it, and its address.

    Args:
        studio: whose models are shown.
        host: the address to listen at; 127.0.0.1 is heard by this machine alone.
        port: None takes the first free one from 7860 on.

    Raises:
        InputError: when gradio is not installed, the host is no address of this machine, or the port is taken.
    """
    # read when gradio is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # it would keep what visitors made, and on this machine lend them whoever's token for the Hub is here
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    try:
        from gradio import themes
        from starlette.middleware import Middleware
    except ImportError as error:
        raise InputError("dualout app needs gradio: pip install 'dualout[app]'") from error
    from dualout.app.page import CSS, FONTS, build

    host = host.removeprefix("[").removesuffix("]")
    _check_host(host)
    page = build(studio)
    try:
        _, address, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host, server_port=port,
            share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
            ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, footer_links=[],
            max_file_size=0,  # a visitor has nothing to upload
            css=CSS,
            theme=themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),
            app_kwargs={"middleware": [Middleware(Policy)]},
        )  # fmt: skip
    except OSError as error:
        where = "the ports from 7860 to 7959 are" if port is None else f"port {port} is"
        raise InputError(f"cannot listen at {host}: {where} taken or not allowed; give another --port") from error
    return page, address


def _check_host(host: str) -> None:
    """See that this machine can listen at an address; gradio would wait for ever for a server that cannot begin."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
            trial.bind((host, 0))
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"cannot listen at --host {host}: {error}; give an address of this machine, 127.0.0.1 or 0.0.0.0"
        ) from error
