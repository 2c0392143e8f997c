"""Bridges to other libraries; nothing here is imported by the base package."""
