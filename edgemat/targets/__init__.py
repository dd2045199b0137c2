"""What becomes of a lowered file outside Python: native projects and the tools that build them."""
