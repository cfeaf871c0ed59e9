"""From inputs that are elsewhere to answers: what reads them on behalf of a user."""
