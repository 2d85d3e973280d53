"""Logs: JSON, one line per state change, on a file or standard error."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

import structlog

Logger = structlog.typing.FilteringBoundLogger


def configure_logs(process: str, file: Path | None = None, level: int = logging.INFO) -> TextIO:
    """JSON lines of this process to ``file`` (appended, line-buffered) or standard error; returns the stream."""
    stream = file.open("a", buffering=1, encoding="utf-8") if file else sys.stderr
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(process=process)
    return stream


def get_logger(**ids: object) -> Logger:
    """A logger with ``ids`` bound once."""
    logger: Logger = structlog.get_logger(**ids)
    return logger
