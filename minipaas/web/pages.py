"""The page for people: apps, machines, databases and how safe they are, live. Owns the browser's cookie.

A browser signs in with a token once and then shows a session's secret; every page passes the same authorisation as the API. No page changes
anything. Needs no build step: one template, one script, one stylesheet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from flask import Blueprint, Flask, Response, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as BaseResponse

from minipaas.access import Action, Principal, authorise, token_hash
from minipaas.errors import NotAuthorised, TooManyClients
from minipaas.service import Platform
from minipaas.settings import Limits
from minipaas.web.api import snapshots
from minipaas.web.sessions import SESSION_DAYS, Sessions

COOKIE = "minipaas"
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def install(app: Flask, platform: Platform, limits: Limits, sessions: Sessions) -> None:
    """Add the pages to the application."""
    app.register_blueprint(_Pages(platform, limits, sessions).blueprint)


class _Pages:
    """A session knows a hash of the token that was given, so that a token that is revoked ends it."""

    def __init__(self, platform: Platform, limits: Limits, sessions: Sessions) -> None:
        self._platform, self._sessions = platform, sessions
        self._followers = threading.BoundedSemaphore(limits.followers)
        self.blueprint = Blueprint("pages", __name__)
        self.blueprint.after_request(_secure)
        self.blueprint.add_url_rule("/", "home", self._home, methods=["GET"])
        self.blueprint.add_url_rule("/events", "events", self._events, methods=["GET"])
        self.blueprint.add_url_rule("/login", "login", self._login, methods=["GET", "POST"])
        self.blueprint.add_url_rule("/logout", "logout", self._logout, methods=["POST"])

    def _home(self) -> BaseResponse | str:
        principal = self._signed_in(_shown())
        if principal is None:
            return redirect(url_for("pages.login"))
        return render_template("home.html", snapshot=self._platform.snapshot(principal))

    def _events(self) -> BaseResponse:
        shown = _shown()
        principal = self._signed_in(shown)
        if principal is None:
            return Response("sign in first", 401)
        if not self._followers.acquire(blocking=False):
            raise TooManyClients("too many pages are open already; close one of them")
        left: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
        stream = snapshots(self._platform, principal, lambda: left() or self._signed_in(shown) is None)
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
        self._sessions.end(_shown())
        answer = redirect(url_for("pages.home"))
        shown = self._sessions.begin(token_hash(token))
        answer.set_cookie(COOKIE, shown, max_age=SESSION_DAYS * 86400, httponly=True, samesite="Strict")
        return answer

    def _logout(self) -> BaseResponse:
        answer = redirect(url_for("pages.login"))
        if _same_origin():
            self._sessions.end(_shown())
            answer.delete_cookie(COOKIE)
        return answer

    def _signed_in(self, shown: str) -> Principal | None:
        """Who the session is of, if there is one and its token is still good for reading."""
        known = self._sessions.token(shown)
        principal = self._platform.principal_of(known) if known else None
        if principal is not None:
            authorise(principal, Action.READ)
        return principal


def _shown() -> str:
    return request.cookies.get(COOKIE, "")


def _same_origin() -> bool:
    origin = request.headers.get("Origin")
    return origin is None or origin in (f"http://{request.host}", f"https://{request.host}")


def _secure(response: Response) -> Response:
    response.headers.update(_SECURITY_HEADERS)
    return response
