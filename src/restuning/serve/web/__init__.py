"""The server over HTTP: an ASGI application, its protocols and its page; needs the extra `serve`."""
