"""The page for people: apps, machines, databases and how safe they are, live. Owns the browser's session.

A browser signs in with a token once and then carries a signed cookie; every page passes the same authorisation as the API. No page changes
anything. Needs no build step: one template, one script, one stylesheet.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from flask import Blueprint, Flask, Response, redirect, render_template, request, session, url_for
from werkzeug.wrappers import Response as BaseResponse

from minipaas.access import Action, Principal, authorise
from minipaas.errors import NotAuthorised, TooManyClients
from minipaas.service import Platform
from minipaas.settings import Limits, write_private
from minipaas.web.api import snapshots

SESSION_DAYS = 30
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def session_key(path: Path) -> str:
    """The key that signs cookies, made once per node."""
    if not path.exists():
        write_private(path, secrets.token_hex(32))
    return path.read_text().strip()


def install(app: Flask, platform: Platform, limits: Limits, key: str) -> None:
    """Add the pages to the application."""
    app.config.update(
        SECRET_KEY=key,
        SESSION_COOKIE_NAME="minipaas",
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Strict",
        PERMANENT_SESSION_LIFETIME=SESSION_DAYS * 86400,
    )
    app.register_blueprint(_Pages(platform, limits).blueprint)


class _Pages:
    """The session holds a hash of the token that was given, so that a token that is revoked ends it."""

    def __init__(self, platform: Platform, limits: Limits) -> None:
        self._platform = platform
        self._followers = threading.BoundedSemaphore(limits.followers)
        self._tokens: dict[str, str] = {}
        self.blueprint = Blueprint("pages", __name__)
        self.blueprint.after_request(_secure)
        self.blueprint.add_url_rule("/", "home", self._home, methods=["GET"])
        self.blueprint.add_url_rule("/events", "events", self._events, methods=["GET"])
        self.blueprint.add_url_rule("/login", "login", self._login, methods=["GET", "POST"])
        self.blueprint.add_url_rule("/logout", "logout", self._logout, methods=["POST"])

    def _home(self) -> BaseResponse | str:
        principal = self._signed_in()
        if principal is None:
            return redirect(url_for("pages.login"))
        return render_template("home.html", snapshot=self._platform.snapshot(principal))

    def _events(self) -> BaseResponse:
        principal = self._signed_in()
        if principal is None:
            return Response("sign in first", 401)
        if not self._followers.acquire(blocking=False):
            raise TooManyClients("too many pages are open already; close one of them")
        gone: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
        stream = snapshots(self._platform, principal, gone)
        response = Response(stream, mimetype="text/event-stream", headers={"X-Accel-Buffering": "no"})
        response.call_on_close(self._followers.release)
        return response

    def _login(self) -> BaseResponse | str | tuple[str, int]:
        if request.method == "GET":
            return render_template("login.html", wrong=False)
        if not _same_origin():
            return Response("this form was sent from another site", 403)
        token = request.form.get("token", "")[:512]
        try:
            principal = self._platform.authenticate(f"Bearer {token}")
        except NotAuthorised:
            return render_template("login.html", wrong=True), 401
        authorise(principal, Action.READ)
        session.clear()
        session.permanent = True
        session["token"] = hashlib.sha256(token.encode()).hexdigest()
        return redirect(url_for("pages.home"))

    def _logout(self) -> BaseResponse:
        if _same_origin():
            session.clear()
        return redirect(url_for("pages.login"))

    def _signed_in(self) -> Principal | None:
        """Who the cookie is of, if its token is still good for reading."""
        known = str(session.get("token", ""))
        principal = self._platform.principal_of(known) if known else None
        if principal is not None:
            authorise(principal, Action.READ)
        return principal


def _same_origin() -> bool:
    origin = request.headers.get("Origin")
    return origin is None or urlsplit(origin).netloc == request.host


def _secure(response: Response) -> Response:
    response.headers.update(_SECURITY_HEADERS)
    return response
