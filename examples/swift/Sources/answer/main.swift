// Answers a prompt with a model that mlx-sft trained, word by word:
//
//     answer MODEL PROMPT                an export of mlx-sft (--format mlx), or a model's name on the Hugging Face Hub
//     answer MODEL PROMPT ADAPTER        the base, and an adapter that `mlx-sft export --format mlx-lm` wrote for it

import Foundation
import HuggingFace
import MLXHuggingFace
import MLXLLM
import MLXLMCommon
import Tokenizers

func folder(_ path: String) -> URL {
    URL(filePath: (path as NSString).expandingTildeInPath, directoryHint: .isDirectory)
}

func loaded(_ name: String) async throws -> ModelContainer {
    let place = folder(name)
    let isHere = FileManager.default.fileExists(atPath: place.path(percentEncoded: false))
    return try await LLMModelFactory.shared.loadContainer(
        from: #hubDownloader(),
        using: #huggingFaceTokenizerLoader(),
        configuration: isHere ? ModelConfiguration(directory: place) : ModelConfiguration(id: name))
}

func answer(model: String, prompt: String, adapter: String?) async throws {
    let container = try await loaded(model)
    if let adapter {
        let trained = try LoRAContainer.from(directory: folder(adapter))
        // It throws, and names the modules, where the model has no place for a part of the adapter.
        try await container.perform { context in
            try context.model.load(adapter: trained)
        }
    }
    let session = ChatSession(
        container, generateParameters: GenerateParameters(maxTokens: 512, temperature: 0))
    for try await text in session.streamResponse(to: prompt) {
        FileHandle.standardOutput.write(Data(text.utf8))
    }
    print()
}

let arguments = CommandLine.arguments.dropFirst()
guard (2...3).contains(arguments.count) else {
    FileHandle.standardError.write(Data("usage: answer MODEL PROMPT [ADAPTER]\n".utf8))
    exit(2)
}
let given = Array(arguments)
do {
    try await answer(model: given[0], prompt: given[1], adapter: given.count == 3 ? given[2] : nil)
} catch {
    FileHandle.standardError.write(Data("error: \(error)\n".utf8))
    exit(1)
}
