"""The command cluster."""

def take_part() -> bool:
    """Whether this process has followed rank 0 to its end; rank 0 is connected with the others."""
    from ..model.loading import load_part
    from ..model.ring import follow, group, leader

    if group().rank() == 0:
        leader()
        return False
    follow(load=load_part)
    return True
