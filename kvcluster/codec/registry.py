"""The codecs that exist. Adding one is a file and a line here."""

CODECS = ("exact",)
