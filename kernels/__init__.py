"""The operations of the model: each module holds a plain-torch reference and the backends that compute the same.

`dispatch.select_ops` chooses one backend per operation. Nothing here knows of the trainer.
"""
