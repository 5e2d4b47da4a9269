def create(context: object) -> None:
    return None
