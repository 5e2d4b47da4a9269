def diagnose(config: object) -> list[object]:
    return []
