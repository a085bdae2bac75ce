"""Launch lines of other servers as a recipe and flags of `llmbuild serve`: every flag is mapped, moot or refused."""
