"""Take requests over HTTP, hand them to the service, and say what came of them: routes, schema, guard."""

from modelops.server.http.app import make_app

__all__ = ["make_app"]
