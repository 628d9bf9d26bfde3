"""The HTTP side of the platform: the Flask application.

Owns which blueprints there are and what an error looks like. Pages join by their own blueprint.
"""

from __future__ import annotations

import logging

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from minipaas.errors import BadRequest, NotFound, PlatformError
from minipaas.service import Platform
from minipaas.settings import Limits
from minipaas.web.api import Api, error_answer

log = logging.getLogger(__name__)


def create_app(platform: Platform, limits: Limits) -> Flask:
    """The API alone; pages are installed into what this returns."""
    app = Flask(__name__)
    app.register_blueprint(Api(platform, limits).blueprint)
    app.register_error_handler(PlatformError, error_answer)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _fault)
    return app


def _http_error(error: HTTPException) -> Response | HTTPException:
    if not request.path.startswith("/v1"):
        return error
    if error.code == 404:
        return error_answer(NotFound(f"there is no {request.path} in this API"))
    answer = error_answer(BadRequest(f"{request.method} {request.path}: {error.description}"))
    answer.status_code = error.code or 400
    return answer


def _fault(error: Exception) -> Response:
    """A fault of ours: the details go to the log, not to the client."""
    log.error("a request failed", exc_info=error, extra={"path": request.path})
    return error_answer(PlatformError("internal error; the log of minipaas serve says more"))
