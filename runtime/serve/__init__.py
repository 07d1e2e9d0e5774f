"""An HTTP server in front of an engine, with OpenAI's API. It needs fastapi, uvicorn and
prometheus_client (the extra `serve`), which nothing else of the runtime does."""
