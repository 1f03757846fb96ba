"""From a method's name to its tensor part, imported only when a trial of it is trained."""

from importlib import import_module

from loratune.errors import StudyError
from loratune.methods.base import Method
from loratune.study.methods import describe


def load_method(name: str) -> Method:
    """The tensor part of a method, built in or of an installed package.

    Raises:
        StudyError: the name is unknown, or its implementation cannot be imported or is no Method.
    """
    implementation = describe(name).implementation
    module_name, _, attribute = implementation.partition(":")
    where = f"method {name!r}: its implementation {implementation!r}"
    if not module_name or not attribute:
        raise StudyError(f"{where} is not of the form module:attribute; correct its description")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise StudyError(
            f"{where} cannot be imported ({error}); install or update the package that offers it"
        ) from error
    method: object = vars(module).get(attribute)
    if method is None:
        raise StudyError(
            f"{where} does not exist in {module_name}; update the package that offers it"
        )
    if not isinstance(method, Method):
        raise StudyError(
            f"{where} is {type(method).__name__}, which has no attach(); "
            "expected a loratune.methods.base.Method"
        )
    return method
