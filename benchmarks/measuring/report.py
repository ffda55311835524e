def render(results, path):
    pass
