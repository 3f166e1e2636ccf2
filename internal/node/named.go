package node

import (
	"fmt"
	"reflect"

	"github.com/fxamacker/cbor/v2"
)

// decode reads a record of the journal.
func decode(b []byte, record any) error {
	if named(b) {
		return decodeNamed(b, reflect.ValueOf(record).Elem())
	}
	return cbor.Unmarshal(b, record)
}

// named tells whether b is a map whose keys are the names of fields, as in the first
// journals, and not their numbers.
func named(b []byte) bool {
	const text = 3
	head := 1
	if len(b) > 0 && b[0] == 0xb8 { // the number of pairs has an octet of its own
		head = 2
	}
	return len(b) > head && b[0]>>5 == 5 && b[head]>>5 == text
}

func decodeNamed(b []byte, v reflect.Value) error {
	var fields map[string]cbor.RawMessage
	if err := cbor.Unmarshal(b, &fields); err != nil {
		return err
	}
	for name, raw := range fields {
		if name == "ID" { // of a connection; the key has it
			continue
		}
		f := v.FieldByName(name)
		if !f.IsValid() {
			return fmt.Errorf("a record has a field %q", name)
		}
		var err error
		if f.Kind() == reflect.Struct && named(raw) {
			err = decodeNamed(raw, f)
		} else {
			err = cbor.Unmarshal(raw, f.Addr().Interface())
		}
		if err != nil {
			return fmt.Errorf("field %s: %w", name, err)
		}
	}
	return nil
}
