// What Ollama makes of a Modelfile's TEMPLATE and a conversation, with nothing but Go's standard library.
//
// Reads a JSON list of {template, messages} from stdin, writes a JSON list of prompts to stdout.
package main

import (
	"encoding/json"
	"log"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

type Case struct {
	Template string
	Messages []Message
}

// Neighbours of one role become one message, and all that the system says is in a value of its own; as in Ollama's
// template package (https://github.com/ollama/ollama/blob/main/template/template.go, "collate").
func collate(messages []Message) (string, []*Message) {
	var system []string
	var collated []*Message
	for _, message := range messages {
		if message.Role == "system" {
			system = append(system, message.Content)
		}
		last := len(collated) - 1
		if last >= 0 && collated[last].Role == message.Role {
			collated[last].Content += "\n\n" + message.Content
		} else {
			copied := message
			collated = append(collated, &copied)
		}
	}
	return strings.Join(system, "\n\n"), collated
}

func render(one Case) string {
	parsed, err := template.New("").Option("missingkey=zero").Parse(one.Template)
	if err != nil {
		log.Fatal(err)
	}
	system, messages := collate(one.Messages)
	values := map[string]any{"System": system, "Messages": messages, "Tools": nil, "Response": ""}
	var prompt strings.Builder
	if err := parsed.Execute(&prompt, values); err != nil {
		log.Fatal(err)
	}
	return prompt.String()
}

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		log.Fatal(err)
	}
	prompts := []string{}
	for _, one := range cases {
		prompts = append(prompts, render(one))
	}
	if err := json.NewEncoder(os.Stdout).Encode(prompts); err != nil {
		log.Fatal(err)
	}
}
