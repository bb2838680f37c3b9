"""Write the JSON Schemas that the package holds; a test compares them with what the code would write."""

from loramerge.cli.outputs import OUTPUT_SCHEMAS, output_schemas
from loramerge.diffusion.composing.schemas import COMPOSITION_SCHEMA, composition_schema
from loramerge.files import write_text
from loramerge.files.storage.texts import as_json
from loramerge.merging import RECIPE_SCHEMA, recipe_schema

SCHEMAS = {
    RECIPE_SCHEMA: recipe_schema(),
    OUTPUT_SCHEMAS: output_schemas(),
    COMPOSITION_SCHEMA: composition_schema(),
}

for path, schema in SCHEMAS.items():
    write_text(path, as_json(schema, indent=2) + "\n")
