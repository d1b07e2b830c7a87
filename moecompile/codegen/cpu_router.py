"""Placeholder."""
from __future__ import annotations
from moecompile.ir import reference
from moecompile.ir.spec import RouterSpec, router_from_text
def supports_router(spec: RouterSpec) -> str | None:
    return None
def prepare_router(spec: RouterSpec) -> None:
    pass
def route(logits, bias, spec):
    return reference.route(router_from_text(spec), logits, bias)
