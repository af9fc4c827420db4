"""stub"""
def probe():
    return {"linear": "onednn", "packed": ["float32"]}
def use(choice):
    return choice
