"""The fields that all pieces of one answer share."""

from serving.gateway.dialect.chunks import Identity


def test_an_identity_is_32_hexadecimal_digits_and_whole_seconds() -> None:
    identity = Identity.new("m")
    assert len(identity.id) == 32
    assert set(identity.id) <= set("0123456789abcdef")
    assert isinstance(identity.created, int)
    assert identity.id != Identity.new("m").id
    assert Identity.new("m", "a request's").id == "a request's"
